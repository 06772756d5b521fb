// int4 and int4-32, as psyche/numerics/codecs/int4.py defines them. Part of level.cpp.
#pragma once

#include "range.h"

namespace psyche {
namespace {
namespace int4 {

// Order of the floats as order of integers, for the same reason as in delta_of. It is its own inverse.
inline i32 ordered(i32 pattern) { return pattern ^ (i32)((u32)(pattern >> 31) >> 1); }

template <int BLOCK>
inline u32 scale_of(const float* values) {
  i32 highest = ordered((i32)bits_of(values[0])), lowest = highest;
  for (int i = 0; i < BLOCK; ++i) {
    const i32 x = ordered((i32)bits_of(values[i]));
    highest = highest > x ? highest : x;
    lowest = lowest < x ? lowest : x;
  }
  return int4_scale(float_of((u32)ordered(highest)), float_of((u32)ordered(lowest)));
}

template <int BLOCK>
inline void quantize(float* values, float scale, u8* packed) {
  float* __restrict x = values;
  if (scale == 0.0f) {
    __builtin_memset(packed, 0, BLOCK / 2);
    return;
  }
  alignas(64) u8 nibbles[BLOCK];
  for (int i = 0; i < BLOCK; ++i) {
    const i32 code = int4_code(x[i], scale);
    nibbles[i] = (u8)(code & 15);
    x[i] = sub(x[i], int4_value(code, scale));
  }
  const packed_u16* pairs = (const packed_u16*)nibbles;
  u8* __restrict out = packed;
  for (int i = 0; i < BLOCK / 2; ++i) out[i] = (u8)(pairs[i] | pairs[i] >> 4);
}

inline const packed_u16* scales_of(Source from, int block) {
  return (const packed_u16*)(from.body + from.count / 2) + from.chunk * (CHUNK / block);
}

template <int BLOCK>
inline i64 encode(const Input& in, Target to) {
  float scratch[CHUNK];
  const i64 start = to.chunk * CHUNK;
  const Delta delta = delta_of(in, start, CHUNK, scratch);
  if (delta.largest >= INFINITE) return start + first_non_finite(delta.values);
  packed_u16* scales = (packed_u16*)(to.body + to.count / 2) + start / BLOCK;
  for (int block = 0; block < CHUNK / BLOCK; ++block) {
    float* values = delta.values + block * BLOCK;
    const u32 scale = scale_of<BLOCK>(values);
    quantize<BLOCK>(values, bf16_widened(scale), to.body + (start + block * BLOCK) / 2);
    scales[block] = (u16)scale;
  }
  return -1;
}

template <int BLOCK>
inline u32 check(Source from) {
  const packed_u16* scales = scales_of(from, BLOCK);
  u32 faults = 0;
  for (int block = 0; block < CHUNK / BLOCK; ++block) {
    if (!int4_scale_valid(scales[block])) faults |= scales[block] == BF16_SIGN ? SCALE_MINUS_ZERO : SCALE_OVERFLOWS;
  }
  return faults;
}

// Codes of one block, in order.
template <int BLOCK>
inline void unpack(const u8* packed, i8* codes) {
  const u8* __restrict in = packed;
  u16* __restrict pairs = (u16*)codes;
  for (int i = 0; i < BLOCK / 2; ++i) pairs[i] = (u16)((in[i] & 15) | (in[i] & 0xF0) << 4);
  for (int i = 0; i < BLOCK; ++i) codes[i] = (i8)int4_signed((u8)codes[i]);
}

template <int BLOCK>
inline void decode_add(Source from, float weight, float* out) {
  const packed_u16* scales = scales_of(from, BLOCK);
  for (int block = 0; block < CHUNK / BLOCK; ++block) {
    const i64 at = from.chunk * CHUNK + block * BLOCK;
    alignas(64) i8 codes[BLOCK];
    unpack<BLOCK>(from.body + at / 2, codes);
    float* __restrict sums = out + at;
    const float scale = bf16_widened(scales[block]);
    for (int i = 0; i < BLOCK; ++i) sums[i] = weighted_sum(sums[i], weight, int4_value(codes[i], scale));
  }
}

template <int BLOCK>
inline int norm_terms(Source from, double* terms) {
  const packed_u16* scales = scales_of(from, BLOCK);
  for (int block = 0; block < CHUNK / BLOCK; ++block) {
    alignas(64) i8 codes[BLOCK];
    unpack<BLOCK>(from.body + (from.chunk * CHUNK + block * BLOCK) / 2, codes);
    i32 sum = 0;
    for (int i = 0; i < BLOCK; ++i) sum += (i32)codes[i] * codes[i];
    const double scale = bf16_widened(scales[block]);
    terms[block] = (double)sum * (scale * scale);
  }
  return CHUNK / BLOCK;
}

}  // namespace int4
}  // namespace
}  // namespace psyche
