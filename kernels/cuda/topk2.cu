// topk2: one thread block finds the largest of a chunk of 4096 values and packs them; one warp decodes a chunk.
//
// The chunk stays in registers: 16 values a thread, four in each of four rows, so that (row, thread, value) is the
// order of the indices. The kept-th largest magnitude is found by radix selection (three digits of 11 bits, histograms
// in shared memory); of equal magnitudes the first are taken, by a prefix sum over the chunk.
#include "lanes.cuh"

namespace psyche {

constexpr int CHUNK_ROWS = 4;
constexpr int CHUNK_ROW = 4 * THREADS;
static_assert(CHUNK_ROWS * CHUNK_ROW == CHUNK, "a block holds one chunk");

constexpr int DIGIT = 11;
constexpr int BINS = 1 << DIGIT;
constexpr int BINS_EACH = BINS / THREADS;

template <int KEPT>
struct TopK2Shared {
  u32 histogram[BINS];       // largest digit first
  u32 totals[CHUNK_ROWS * WARPS];
  u32 words[TopK2Layout::of(KEPT).bytes / 4];
  float values[KEPT];        // by rank
  u16 indices[KEPT];
  u32 digit, wanted;         // what the search for the threshold found, digit by digit
};

// The sum of `x` over the threads before this one. `totals` holds a word for each warp; all threads must call.
PSYCHE_FN u32 sum_before(u32 x, u32* totals) {
  const u32 running = running_sum(x);
  const int warp = (int)threadIdx.x / WARP;
  if (lane_of() == WARP - 1) totals[warp] = running;
  __syncthreads();
  u32 before = running - x;
  for (int other = 0; other < warp; ++other) before += totals[other];
  return before;
}

struct Threshold {
  u32 magnitude;  // bits of the kept-th largest
  u32 ties;       // how many of exactly that magnitude are kept
};

// Needs a histogram of zeros, and a barrier since; leaves it so.
template <int KEPT>
PSYCHE_FN Threshold kth_largest(TopK2Shared<KEPT>& shared, const Four (&y)[CHUNK_ROWS]) {
  u32 found = 0, wanted = KEPT;
#pragma unroll
  for (int shift = 31 - DIGIT; shift > -DIGIT; shift -= DIGIT) {
    const int low = shift > 0 ? shift : 0;  // the last digit has 9 bits
    const int above = shift + DIGIT;
#pragma unroll
    for (int row = 0; row < CHUNK_ROWS; ++row)
      for (int k = 0; k < 4; ++k) {
        const u32 magnitude = magnitude_bits(y[row].of[k]);
        if ((u64)magnitude >> above == (u64)found >> above)
          atomicAdd(&shared.histogram[BINS - 1 - (magnitude >> low & ((1u << (above - low)) - 1u))], 1u);
      }
    __syncthreads();
    u32 bins[BINS_EACH], sum = 0;
#pragma unroll
    for (int i = 0; i < BINS_EACH; ++i) {
      bins[i] = shared.histogram[BINS_EACH * threadIdx.x + i];
      shared.histogram[BINS_EACH * threadIdx.x + i] = 0;
      sum += bins[i];
    }
    u32 before = sum_before(sum, shared.totals);
    if (before < wanted && wanted <= before + sum) {  // true of one thread
#pragma unroll
      for (int i = 0; i < BINS_EACH; ++i) {
        if (before < wanted && wanted <= before + bins[i]) {
          shared.digit = BINS - 1 - (BINS_EACH * threadIdx.x + i);
          shared.wanted = wanted - before;
        }
        before += bins[i];
      }
    }
    __syncthreads();
    found |= shared.digit << low;
    wanted = shared.wanted;
  }
  return Threshold{found, wanted};
}

// Writes the kept values and their indices to shared memory, in the order of the indices.
template <int KEPT>
PSYCHE_FN void collect(TopK2Shared<KEPT>& shared, const Four (&y)[CHUNK_ROWS], Threshold least) {
  u32 counts[CHUNK_ROWS], running[CHUNK_ROWS];  // values above the threshold, times 2^16, plus those that equal it
  const int warp = (int)threadIdx.x / WARP, lane = lane_of();
#pragma unroll
  for (int row = 0; row < CHUNK_ROWS; ++row) {
    counts[row] = 0;
    for (int k = 0; k < 4; ++k) {
      const u32 magnitude = magnitude_bits(y[row].of[k]);
      counts[row] += magnitude > least.magnitude ? 0x10000u : magnitude == least.magnitude ? 1u : 0u;
    }
    running[row] = running_sum(counts[row]);
    if (lane == WARP - 1) shared.totals[row * WARPS + warp] = running[row];
  }
  __syncthreads();
  static_assert(CHUNK_ROWS * WARPS == WARP, "one lane for each warp's share of a row");
  const u32 total = shared.totals[lane];
  const u32 earlier = running_sum(total) - total;
#pragma unroll
  for (int row = 0; row < CHUNK_ROWS; ++row) {
    const u32 before = __shfl_sync(ALL_LANES, earlier, row * WARPS + warp) + running[row] - counts[row];
    u32 above = before >> 16, ties = before & 0xFFFFu;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const u32 magnitude = magnitude_bits(y[row].of[k]);
      const bool is_above = magnitude > least.magnitude, is_tie = magnitude == least.magnitude;
      if (is_above || (is_tie && ties < least.ties)) {
        const u32 rank = above + min_u32(ties, least.ties);
        shared.values[rank] = y[row].of[k];
        shared.indices[rank] = (u16)(row * CHUNK_ROW + 4 * threadIdx.x + k);
      }
      above += is_above ? 1u : 0u;
      ties += is_tie ? 1u : 0u;
    }
  }
}

// One warp: levels, signs and magnitudes of the kept values, into shared memory.
template <int KEPT>
PSYCHE_FN void quantize_kept(TopK2Shared<KEPT>& shared, bool has_zero) {
  constexpr TopK2Layout LAYOUT = TopK2Layout::of(KEPT);
  constexpr int EACH = KEPT / WARP;
  const int lane = lane_of();
  u32 largest = 0, total = 0, fixed[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) largest = max_u32(largest, magnitude_bits(shared.values[i * WARP + lane]));
  const u32 top = level_top(max_over(largest));
#pragma unroll
  for (int i = 0; i < EACH; ++i) total += fixed[i] = level_fixed(magnitude_bits(shared.values[i * WARP + lane]), top);
  Levels levels = Levels::start(sum_over(total), KEPT, has_zero);
  for (int iteration = 0; iteration < LEVEL_ITERATIONS; ++iteration) {
    u32 sum_high = 0, n_high = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      sum_high += fixed[i] > levels.threshold ? fixed[i] : 0u;
      n_high += fixed[i] > levels.threshold ? 1u : 0u;
    }
    Levels::step(levels, sum_over(sum_high), sum_over(n_high));
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const u32 signs = __ballot_sync(ALL_LANES, shared.values[i * WARP + lane] < 0.0f);
    const u32 magnitudes = __ballot_sync(ALL_LANES, fixed[i] > levels.threshold);
    if (lane == 0) {
      shared.words[LAYOUT.signs / 4 + i] = signs;
      shared.words[LAYOUT.magnitudes / 4 + i] = magnitudes;
    }
  }
  if (lane == 0) shared.words[0] = level_bf16(levels.low, top) | level_bf16(levels.high, top) << 16;
}

// All threads: the indices, by Elias and Fano, into words of shared memory that are zero.
template <int KEPT>
PSYCHE_FN void pack_indices(TopK2Shared<KEPT>& shared) {
  constexpr TopK2Layout LAYOUT = TopK2Layout::of(KEPT);
  for (u32 rank = threadIdx.x; rank < KEPT; rank += THREADS) {
    const u32 index = shared.indices[rank], bit = (index >> LAYOUT.low_bits) + rank;
    atomicOr(&shared.words[LAYOUT.upper / 4 + bit / 32], 1u << bit % 32);
    const u32 at = rank * LAYOUT.low_bits, rest = index & ((1u << LAYOUT.low_bits) - 1u);
    atomicOr(&shared.words[LAYOUT.lower / 4 + at / 32], rest << at % 32);
    if (at % 32 + LAYOUT.low_bits > 32) atomicOr(&shared.words[LAYOUT.lower / 4 + at / 32 + 1], rest >> (32 - at % 32));
  }
}

// All threads, once the words are complete: what was sent leaves the residual.
template <int KEPT>
PSYCHE_FN void subtract_kept(const TopK2Shared<KEPT>& shared, float* residual) {
  constexpr TopK2Layout LAYOUT = TopK2Layout::of(KEPT);
  const float low = bf16_widened(shared.words[0] & 0xFFFFu), high = bf16_widened(shared.words[0] >> 16);
  for (u32 rank = threadIdx.x; rank < KEPT; rank += THREADS) {
    const bool is_high = (shared.words[LAYOUT.magnitudes / 4 + rank / 32] >> rank % 32 & 1u) != 0;
    const float x = shared.values[rank];
    residual[shared.indices[rank]] = sub(x, level_value(is_high ? high : low, x < 0.0f));
  }
}

template <int KEPT>
PSYCHE_FN void topk2_encode_chunk(TopK2Shared<KEPT>& shared, const float* base, const float* local, float* residual,
                                  float beta, u8* body, u64* non_finite) {
  constexpr TopK2Layout LAYOUT = TopK2Layout::of(KEPT);
  constexpr u32 WORDS = LAYOUT.bytes / 4;
  const u64 first = (u64)blockIdx.x * CHUNK + 4 * threadIdx.x;
  Four y[CHUNK_ROWS];
#pragma unroll
  for (int row = 0; row < CHUNK_ROWS; ++row)
    y[row] = load_feedback(base, local, residual, beta, first + row * CHUNK_ROW);
#pragma unroll
  for (int row = 0; row < CHUNK_ROWS; ++row) note_non_finite(y[row], first + row * CHUNK_ROW, non_finite);

  if (residual != nullptr) {  // most of it stays as it is: the few that are sent are changed at the end
#pragma unroll
    for (int row = 0; row < CHUNK_ROWS; ++row) store_four(residual + first + row * CHUNK_ROW, y[row]);
  }
  for (u32 i = threadIdx.x; i < BINS; i += THREADS) shared.histogram[i] = 0;
  for (u32 i = threadIdx.x; i < WORDS; i += THREADS) shared.words[i] = 0;
  __syncthreads();
  const Threshold least = kth_largest(shared, y);
  collect(shared, y, least);
  __syncthreads();
  if (threadIdx.x < WARP) quantize_kept(shared, least.magnitude == 0);
  pack_indices(shared);
  __syncthreads();

  u32* out = reinterpret_cast<u32*>(body) + (u64)blockIdx.x * WORDS;
  for (u32 i = threadIdx.x; i < WORDS; i += THREADS) out[i] = shared.words[i];
  if (residual != nullptr) subtract_kept(shared, residual + (u64)blockIdx.x * CHUNK);
}

PSYCHE_FN u64 warp_number() { return (u64)blockIdx.x * WARPS + threadIdx.x / WARP; }

// The low bits of the index of that rank. A plane follows the packed bits, so the next word is there to be read.
template <int KEPT>
PSYCHE_FN u32 low_part(const u32* words, u32 rank) {
  constexpr TopK2Layout LAYOUT = TopK2Layout::of(KEPT);
  const u32 at = rank * LAYOUT.low_bits;
  const u32* pair = words + LAYOUT.lower / 4 + at / 32;
  return (u32)(((u64)pair[1] << 32 | pair[0]) >> at % 32) & ((1u << LAYOUT.low_bits) - 1u);
}

template <int KEPT>
PSYCHE_FN void topk2_decode_add_chunk(const u8* __restrict__ body, float weight, float* __restrict__ sum, u64 count,
                                      const u32* malformed) {
  constexpr TopK2Layout LAYOUT = TopK2Layout::of(KEPT);
  const u64 chunk = warp_number();
  if (chunk >= count / CHUNK || *malformed != 0) return;
  const u32 lane = lane_of();
  const u32* words = reinterpret_cast<const u32*>(body) + chunk * (LAYOUT.bytes / 4);
  const float low = bf16_widened(words[0] & 0xFFFFu), high = bf16_widened(words[0] >> 16);
  u32 before = 0;
#pragma unroll 4
  for (int i = 0; i < KEPT / 16; ++i) {
    const u32 upper = words[LAYOUT.upper / 4 + i];
    if ((upper >> lane & 1u) != 0) {
      const u32 rank = before + __popc(upper & ((1u << lane) - 1u));
      const u32 index = (32 * i + lane - rank) << LAYOUT.low_bits | low_part<KEPT>(words, rank);
      const bool negative = (words[LAYOUT.signs / 4 + rank / 32] >> rank % 32 & 1u) != 0;
      const bool is_high = (words[LAYOUT.magnitudes / 4 + rank / 32] >> rank % 32 & 1u) != 0;
      float* at = sum + chunk * CHUNK + index;
      *at = weighted_sum(*at, weight, level_value(is_high ? high : low, negative));
    }
    before += __popc(upper);
  }
}

// Ranks from KEPT on have no low bits to be read: their number alone is refused.
template <int KEPT>
PSYCHE_FN void topk2_check_chunk(const u8* __restrict__ body, u64 count, u32* malformed) {
  constexpr TopK2Layout LAYOUT = TopK2Layout::of(KEPT);
  const u64 chunk = warp_number();
  if (chunk >= count / CHUNK) return;
  const u32 lane = lane_of();
  const u32* words = reinterpret_cast<const u32*>(body) + chunk * (LAYOUT.bytes / 4);
  u32 before = 0, previous = 0;  // of the word before
  bool repeated = false;
#pragma unroll 4
  for (int i = 0; i < KEPT / 16; ++i) {
    const u32 upper = words[LAYOUT.upper / 4 + i];
    const u32 follows = upper & (upper << 1 | previous >> 31);  // indices with the same high part as the one before
    const u32 rank = before + __popc(upper & ((1u << lane) - 1u));
    if ((follows >> lane & 1u) != 0 && rank < KEPT)
      repeated = repeated || low_part<KEPT>(words, rank) <= low_part<KEPT>(words, rank - 1);
    before += __popc(upper);
    previous = upper;
  }
  if (repeated || before != KEPT || previous >> 31 != 0) refuse(malformed, BAD_INDEX);
  if (!levels_valid(words[0] & 0xFFFFu, words[0] >> 16)) refuse(malformed, BAD_SCALE);
}

}  // namespace psyche

#define PSYCHE_TOPK2(KEPT)                                                                                          \
  extern "C" __global__ void __launch_bounds__(256)                                                                 \
  topk2_##KEPT##_encode(const float* base, const float* local, float* residual, float beta, psyche::u8* body,       \
                        psyche::u64 /* the grid says */, psyche::u64* non_finite) {                                 \
    __shared__ psyche::TopK2Shared<KEPT> shared;                                                                    \
    psyche::topk2_encode_chunk<KEPT>(shared, base, local, residual, beta, body, non_finite);                        \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256)                                                                 \
  topk2_##KEPT##_decode_add(const psyche::u8* body, float weight, float* sum, psyche::u64 count,                    \
                            const psyche::u32* malformed) {                                                         \
    psyche::topk2_decode_add_chunk<KEPT>(body, weight, sum, count, malformed);                                      \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256)                                                                 \
  topk2_##KEPT##_check(const psyche::u8* body, psyche::u64 count, psyche::u32* malformed) {                         \
    psyche::topk2_check_chunk<KEPT>(body, count, malformed);                                                        \
  }

PSYCHE_TOPK2(64)
PSYCHE_TOPK2(256)
PSYCHE_TOPK2(512)
