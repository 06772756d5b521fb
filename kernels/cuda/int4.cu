// int4 and int4-32: one warp for 256 values, hence for two blocks of 128 or eight of 32; the body is all codes, two a
// byte, then all scales.
#include "lanes.cuh"

namespace psyche {

// `codes` holds this lane's four codes of row 0 (low half) and of row 1. The tile's codes are 32 words, row 0 first:
// each lane stores one of them, put together from two lanes.
PSYCHE_FN void store_nibbles(u8* body, u64 tile, u32 codes) {
  const int lane = lane_of(), from = 2 * lane % WARP;
  const u32 first = __shfl_sync(ALL_LANES, codes, from), second = __shfl_sync(ALL_LANES, codes, from + 1);
  const u32 word = lane < WARP / 2 ? (first & 0xFFFFu) | second << 16 : first >> 16 | (second & 0xFFFF0000u);
  reinterpret_cast<u32*>(body)[tile * (TILE / 8) + lane] = word;
}

template <int BLOCK>
PSYCHE_FN void int4_encode_tile(const float* base, const float* local, float* residual, float beta, u8* body, u64 count,
                                u64* non_finite) {
  constexpr int LANES = BLOCK / 4;  // that share a block
  const u64 number = tile_of();
  u16* scales = reinterpret_cast<u16*>(body + count / 2) + number * (TILE / BLOCK);
  Four tile[ROWS];
  load_tile(tile, base, local, residual, beta, number, non_finite);
  u32 packed = 0;
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    float highest = tile[row].of[0], lowest = -tile[row].of[0];  // the lowest with its sign changed
#pragma unroll
    for (int k = 1; k < 4; ++k) {
      highest = tile[row].of[k] > highest ? tile[row].of[k] : highest;
      lowest = -tile[row].of[k] > lowest ? -tile[row].of[k] : lowest;
    }
    const u32 scale_bits = int4_scale(max_over<LANES>(highest), -max_over<LANES>(lowest));
    const float scale = bf16_widened(scale_bits);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const i32 code = int4_code(tile[row].of[k], scale);
      packed |= ((u32)code & 15u) << (16 * row + 4 * k);
      tile[row].of[k] = sub(tile[row].of[k], int4_value(code, scale));
    }
    if (lane_of() % LANES == 0) scales[row * (ROW / BLOCK) + lane_of() / LANES] = (u16)scale_bits;
  }
  store_nibbles(body, number, packed);
  store_tile(residual, number, tile);
}

template <int BLOCK>
PSYCHE_FN void int4_decode_add_tile(const u8* body, float weight, float* sum, u64 count, const u32* malformed) {
  if (*malformed != 0) return;
  constexpr int LANES = BLOCK / 4;
  const u64 number = tile_of();
  const u16* scales = reinterpret_cast<const u16*>(body + count / 2) + number * (TILE / BLOCK);
  u32 codes[ROWS];
  float scale[ROWS];
  Four sums[ROWS];
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const u64 at = position_in(number, row);
    codes[row] = reinterpret_cast<const u16*>(body)[at / 4];
    scale[row] = bf16_widened(scales[row * (ROW / BLOCK) + lane_of() / LANES]);
    sums[row] = load_four(sum + at);
  }
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float value = int4_value(int4_signed(codes[row] >> 4 * k & 15u), scale[row]);
      sums[row].of[k] = weighted_sum(sums[row].of[k], weight, value);
    }
    store_four(sum + position_in(number, row), sums[row]);
  }
}

// Any code is a valid one. One thread for 8 scales.
PSYCHE_FN void int4_check_scales(const u8* body, u64 count, u64 scales, u32* malformed) {
  const u64 at = (u64)blockIdx.x * THREADS + threadIdx.x;
  if (8 * at >= scales) return;
  const uint4 wide = reinterpret_cast<const uint4*>(body + count / 2)[at];
  const u32 words[4] = {wide.x, wide.y, wide.z, wide.w};
  for (int i = 0; i < 4; ++i)
    if (!int4_scale_valid(words[i] & 0xFFFFu) || !int4_scale_valid(words[i] >> 16)) refuse(malformed, BAD_SCALE);
}

}  // namespace psyche

extern "C" __global__ void __launch_bounds__(256)
int4_encode(const float* base, const float* local, float* residual, float beta, psyche::u8* body, psyche::u64 count,
            psyche::u64* non_finite) {
  psyche::int4_encode_tile<128>(base, local, residual, beta, body, count, non_finite);
}

extern "C" __global__ void __launch_bounds__(256)
int4_32_encode(const float* base, const float* local, float* residual, float beta, psyche::u8* body, psyche::u64 count,
               psyche::u64* non_finite) {
  psyche::int4_encode_tile<32>(base, local, residual, beta, body, count, non_finite);
}

extern "C" __global__ void __launch_bounds__(256)
int4_decode_add(const psyche::u8* body, float weight, float* sum, psyche::u64 count, const psyche::u32* malformed) {
  psyche::int4_decode_add_tile<128>(body, weight, sum, count, malformed);
}

extern "C" __global__ void __launch_bounds__(256)
int4_32_decode_add(const psyche::u8* body, float weight, float* sum, psyche::u64 count, const psyche::u32* malformed) {
  psyche::int4_decode_add_tile<32>(body, weight, sum, count, malformed);
}

extern "C" __global__ void __launch_bounds__(256)
int4_check(const psyche::u8* body, psyche::u64 count, psyche::u32* malformed) {
  psyche::int4_check_scales(body, count, count / 128, malformed);
}

extern "C" __global__ void __launch_bounds__(256)
int4_32_check(const psyche::u8* body, psyche::u64 count, psyche::u32* malformed) {
  psyche::int4_check_scales(body, count, count / 32, malformed);
}
