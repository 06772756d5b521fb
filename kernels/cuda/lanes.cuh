// How a warp shares 256 values, and what its lanes tell each other.
//
// A warp holds a tile of two rows of 128 values; lane i has values 4i to 4i + 3 of each row, so that a warp's 16-byte
// loads and stores cover 512 bytes in one piece. All sums are sums of integers: their order does not matter.
#pragma once

#include "psyche_numerics.h"

namespace psyche {

constexpr int THREADS = 256;  // of every block of every kernel
constexpr int WARP = 32;
constexpr int WARPS = THREADS / WARP;
constexpr u32 ALL_LANES = 0xFFFFFFFFu;

constexpr int ROWS = 2;
constexpr int ROW = 4 * WARP;
constexpr int TILE = ROWS * ROW;
static_assert(TILE == INT8_BLOCK && TILE == INT2_BLOCK, "a warp holds one block");

PSYCHE_FN int lane_of() { return (int)threadIdx.x % WARP; }
PSYCHE_FN u64 tile_of() { return (u64)blockIdx.x * WARPS + threadIdx.x / WARP; }
PSYCHE_FN u64 position_in(u64 tile, int row) { return tile * TILE + row * ROW + 4 * lane_of(); }

// ------------------------------------------------------------------------------- 16 bytes at a time

struct Four {
  float of[4];
};

PSYCHE_FN Four load_four(const float* from) {
  const float4 wide = *reinterpret_cast<const float4*>(from);
  return Four{{wide.x, wide.y, wide.z, wide.w}};
}
PSYCHE_FN void store_four(float* to, const Four& four) {
  *reinterpret_cast<float4*>(to) = make_float4(four.of[0], four.of[1], four.of[2], four.of[3]);
}

// beta * e + (base - local) from `at` on, or base - local where `residual` is null.
PSYCHE_FN Four load_feedback(const float* base, const float* local, const float* residual, float beta, u64 at) {
  const Four b = load_four(base + at), l = load_four(local + at);
  Four y;
  if (residual != nullptr) {
    const Four e = load_four(residual + at);
    for (int k = 0; k < 4; ++k) y.of[k] = with_feedback(b.of[k], l.of[k], e.of[k], beta);
  } else {
    for (int k = 0; k < 4; ++k) y.of[k] = sub(b.of[k], l.of[k]);
  }
  return y;
}

// Lower `non_finite` to the position of a NaN or an infinity among the four values from `at` on.
PSYCHE_FN void note_non_finite(const Four& four, u64 at, u64* non_finite) {
  for (int k = 0; k < 4; ++k) {
    if (magnitude_bits(four.of[k]) >= INFINITE) {
      atomicMin(non_finite, at + k);
      return;
    }
  }
}

PSYCHE_FN void load_tile(Four (&tile)[ROWS], const float* base, const float* local, const float* residual, float beta,
                         u64 number, u64* non_finite) {
#pragma unroll
  for (int row = 0; row < ROWS; ++row) tile[row] = load_feedback(base, local, residual, beta, position_in(number, row));
#pragma unroll
  for (int row = 0; row < ROWS; ++row) note_non_finite(tile[row], position_in(number, row), non_finite);
}

// What was not sent stays in `residual`, where there is one.
PSYCHE_FN void store_tile(float* residual, u64 number, const Four (&tile)[ROWS]) {
  if (residual == nullptr) return;
#pragma unroll
  for (int row = 0; row < ROWS; ++row) store_four(residual + position_in(number, row), tile[row]);
}

// ------------------------------------------------------------------- over groups of neighbouring lanes

template <int LANES = WARP>
PSYCHE_FN u32 sum_over(u32 x) {
#pragma unroll
  for (int apart = LANES / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(ALL_LANES, x, apart);
  return x;
}

template <int LANES = WARP>
PSYCHE_FN u32 or_over(u32 x) {
#pragma unroll
  for (int apart = LANES / 2; apart > 0; apart /= 2) x |= __shfl_xor_sync(ALL_LANES, x, apart);
  return x;
}

template <int LANES = WARP>
PSYCHE_FN u32 max_over(u32 x) {
#pragma unroll
  for (int apart = LANES / 2; apart > 0; apart /= 2) x = max_u32(x, __shfl_xor_sync(ALL_LANES, x, apart));
  return x;
}

template <int LANES = WARP>
PSYCHE_FN float max_over(float x) {
#pragma unroll
  for (int apart = LANES / 2; apart > 0; apart /= 2) {
    const float other = __shfl_xor_sync(ALL_LANES, x, apart);
    x = x > other ? x : other;
  }
  return x;
}

// The sum over this lane and those before it.
PSYCHE_FN u32 running_sum(u32 x) {
#pragma unroll
  for (int apart = 1; apart < WARP; apart *= 2) {
    const u32 other = __shfl_up_sync(ALL_LANES, x, apart);
    if (lane_of() >= apart) x += other;
  }
  return x;
}

// What is wrong with a payload, as bits of a device word that starts as 0.
enum Malformed : u32 { BAD_SCALE = 1, BAD_CODE = 2, BAD_INDEX = 4, BAD_HEADER = 8 };

PSYCHE_FN void refuse(u32* malformed, u32 reason) { atomicOr(malformed, reason); }

}  // namespace psyche
