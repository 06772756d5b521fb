// int8: one warp for a block of 256 values; the body is all codes, then all scales.
#include "lanes.cuh"

extern "C" __global__ void __launch_bounds__(256)
int8_encode(const float* base, const float* local, float* residual, float beta, psyche::u8* body, psyche::u64 count,
            psyche::u64* non_finite) {
  using namespace psyche;
  const u64 block = tile_of();
  Four tile[ROWS];
  load_tile(tile, base, local, residual, beta, block, non_finite);
  u32 largest = 0;
#pragma unroll
  for (int row = 0; row < ROWS; ++row)
    for (int k = 0; k < 4; ++k) largest = max_u32(largest, magnitude_bits(tile[row].of[k]));
  const float scale = int8_scale(max_over(largest));
  u32 codes[ROWS] = {};
#pragma unroll
  for (int row = 0; row < ROWS; ++row)
    for (int k = 0; k < 4; ++k) {
      const i32 code = int8_code(tile[row].of[k], scale);
      codes[row] |= ((u32)code & 0xFFu) << 8 * k;
      tile[row].of[k] = sub(tile[row].of[k], int8_value(code, scale));
    }
#pragma unroll
  for (int row = 0; row < ROWS; ++row) *reinterpret_cast<u32*>(body + position_in(block, row)) = codes[row];
  store_tile(residual, block, tile);
  if (lane_of() == 0) reinterpret_cast<float*>(body + count)[block] = scale;
}

extern "C" __global__ void __launch_bounds__(256)
int8_decode_add(const psyche::u8* body, float weight, float* sum, psyche::u64 count, const psyche::u32* malformed) {
  using namespace psyche;
  if (*malformed != 0) return;
  const u64 block = tile_of();
  const float scale = reinterpret_cast<const float*>(body + count)[block];
  u32 codes[ROWS];
  Four sums[ROWS];
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const u64 at = position_in(block, row);
    codes[row] = *reinterpret_cast<const u32*>(body + at);
    sums[row] = load_four(sum + at);
  }
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const i32 code = (i8)(codes[row] >> 8 * k);
      sums[row].of[k] = weighted_sum(sums[row].of[k], weight, int8_value(code, scale));
    }
    store_four(sum + position_in(block, row), sums[row]);
  }
}

// One thread for 16 codes, and four of each block's threads for the 16 scales of the same 4096 values.
extern "C" __global__ void __launch_bounds__(256)
int8_check(const psyche::u8* body, psyche::u64 count, psyche::u32* malformed) {
  using namespace psyche;
  const uint4 codes = reinterpret_cast<const uint4*>(body)[(u64)blockIdx.x * THREADS + threadIdx.x];
  const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
  for (int i = 0; i < 4; ++i) {
    const u32 others = words[i] ^ 0x80808080u;  // a byte of it is zero where the code is -128
    if (((others - 0x01010101u) & ~others & 0x80808080u) != 0) refuse(malformed, BAD_CODE);
  }
  if (threadIdx.x >= 4) return;
  const uint4 scales = reinterpret_cast<const uint4*>(body + count)[(u64)blockIdx.x * 4 + threadIdx.x];
  // & and not &&: all four are loaded at once
  if (!(int8_scale_valid(scales.x) & int8_scale_valid(scales.y) & int8_scale_valid(scales.z) &
        int8_scale_valid(scales.w)))
    refuse(malformed, BAD_SCALE);
}
