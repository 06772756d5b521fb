// int2: one warp for a block of 256 values; the body is the plane of signs, the plane of magnitudes, then two levels
// for each block.
#include "lanes.cuh"

namespace psyche {

// Eight lanes hold 32 values of a row, hence one word of a plane: `bits` are this lane's four of each row, row 1 in
// bits 16 to 19. Returns the two words, the same in all eight lanes.
struct PlaneWords {
  u32 of[ROWS];
};
PSYCHE_FN PlaneWords plane_words(u32 bits) {
  const int shift = 4 * (lane_of() % 8);
  return PlaneWords{{or_over<8>((bits & 15u) << shift), or_over<8>((bits >> 16) << shift)}};
}

}  // namespace psyche

extern "C" __global__ void __launch_bounds__(256)
int2_encode(const float* base, const float* local, float* residual, float beta, psyche::u8* body, psyche::u64 count,
            psyche::u64* non_finite) {
  using namespace psyche;
  const u64 block = tile_of();
  const int lane = lane_of();
  Four tile[ROWS];
  load_tile(tile, base, local, residual, beta, block, non_finite);

  u32 largest = 0;
  bool zero = false;
#pragma unroll
  for (int row = 0; row < ROWS; ++row)
    for (int k = 0; k < 4; ++k) {
      const u32 magnitude = magnitude_bits(tile[row].of[k]);
      largest = max_u32(largest, magnitude);
      zero = zero || magnitude == 0;
    }
  const u32 top = level_top(max_over(largest));
  const bool has_zero = __ballot_sync(ALL_LANES, zero) != 0;

  u32 fixed[ROWS][4], total = 0;
#pragma unroll
  for (int row = 0; row < ROWS; ++row)
    for (int k = 0; k < 4; ++k) total += fixed[row][k] = level_fixed(magnitude_bits(tile[row].of[k]), top);
  Levels levels = Levels::start(sum_over(total), INT2_BLOCK, has_zero);
  for (int iteration = 0; iteration < LEVEL_ITERATIONS; ++iteration) {
    u32 sum_high = 0, n_high = 0;
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
      for (int k = 0; k < 4; ++k) {
        const bool high = fixed[row][k] > levels.threshold;
        sum_high += high ? fixed[row][k] : 0u;
        n_high += high ? 1u : 0u;
      }
    Levels::step(levels, sum_over(sum_high), sum_over(n_high));
  }
  const u32 low_bits = level_bf16(levels.low, top), high_bits = level_bf16(levels.high, top);
  const float low = bf16_widened(low_bits), high = bf16_widened(high_bits);

  u32 signs = 0, magnitudes = 0;
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool negative = tile[row].of[k] < 0.0f, is_high = fixed[row][k] > levels.threshold;
      signs |= (negative ? 1u : 0u) << (16 * row + k);
      magnitudes |= (is_high ? 1u : 0u) << (16 * row + k);
      tile[row].of[k] = sub(tile[row].of[k], level_value(is_high ? high : low, negative));
    }
  }

  const PlaneWords sign_words = plane_words(signs), magnitude_words = plane_words(magnitudes);
  u32* planes = reinterpret_cast<u32*>(body);
  const u64 word = block * (TILE / 32) + lane / 8, plane = count / 32;
  switch (lane % 8) {
    case 0: planes[word] = sign_words.of[0]; break;
    case 1: planes[word + ROW / 32] = sign_words.of[1]; break;
    case 2: planes[plane + word] = magnitude_words.of[0]; break;
    case 3: planes[plane + word + ROW / 32] = magnitude_words.of[1]; break;
    default: break;
  }
  if (lane == 0) planes[2 * plane + block] = low_bits | high_bits << 16;
  store_tile(residual, block, tile);
}

extern "C" __global__ void __launch_bounds__(256)
int2_decode_add(const psyche::u8* body, float weight, float* sum, psyche::u64 count, const psyche::u32* malformed) {
  using namespace psyche;
  if (*malformed != 0) return;
  const u64 block = tile_of(), plane = count / 32;
  const int lane = lane_of(), shift = 4 * (lane % 8);
  const u32* planes = reinterpret_cast<const u32*>(body);
  const u32 levels = planes[2 * plane + block];
  const float low = bf16_widened(levels & 0xFFFFu), high = bf16_widened(levels >> 16);
  u32 signs[ROWS], magnitudes[ROWS];
  Four sums[ROWS];
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const u64 word = block * (TILE / 32) + row * (ROW / 32) + lane / 8;
    signs[row] = planes[word] >> shift;
    magnitudes[row] = planes[plane + word] >> shift;
    sums[row] = load_four(sum + position_in(block, row));
  }
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float level = (magnitudes[row] >> k & 1u) != 0 ? high : low;
      const float value = level_value(level, (signs[row] >> k & 1u) != 0);
      sums[row].of[k] = weighted_sum(sums[row].of[k], weight, value);
    }
    store_four(sum + position_in(block, row), sums[row]);
  }
}

// Any planes are valid ones. One thread for the levels of four blocks.
extern "C" __global__ void __launch_bounds__(256)
int2_check(const psyche::u8* body, psyche::u64 count, psyche::u32* malformed) {
  using namespace psyche;
  const u64 at = (u64)blockIdx.x * THREADS + threadIdx.x;
  if (4 * at >= count / INT2_BLOCK) return;
  const uint4 wide = reinterpret_cast<const uint4*>(body + count / 4)[at];
  const u32 words[4] = {wide.x, wide.y, wide.z, wide.w};
  for (int i = 0; i < 4; ++i)
    if (!levels_valid(words[i] & 0xFFFFu, words[i] >> 16)) refuse(malformed, BAD_SCALE);
}
