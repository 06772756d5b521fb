// int8, as psyche/numerics/codecs/int8.py defines it. Part of level.cpp.
#pragma once

#include "range.h"

namespace psyche {
namespace {
namespace int8 {

constexpr int BLOCKS = CHUNK / INT8_BLOCK;

inline const packed_float* scales_of(Source from) {
  return (const packed_float*)(from.body + from.count) + from.chunk * BLOCKS;
}
inline const i8* codes_of(Source from) { return (const i8*)from.body + from.chunk * CHUNK; }

inline void quantize(float* values, float scale, i8* codes) {
  float* __restrict x = values;
  i8* __restrict out = codes;
  if (!(scale > 0.0f)) {
    __builtin_memset(codes, 0, INT8_BLOCK);
    return;
  }
  for (int i = 0; i < INT8_BLOCK; ++i) {
    const i32 code = int8_code(x[i], scale);
    out[i] = (i8)code;
    x[i] = sub(x[i], int8_value(code, scale));
  }
}

inline i64 encode(const Input& in, Target to) {
  float scratch[INT8_BLOCK];
  for (int block = 0; block < BLOCKS; ++block) {
    const i64 at = to.chunk * CHUNK + block * INT8_BLOCK;
    const Delta delta = delta_of(in, at, INT8_BLOCK, scratch);
    if (delta.largest >= INFINITE) return at + first_non_finite(delta.values);
    const float scale = int8_scale(delta.largest);
    quantize(delta.values, scale, (i8*)to.body + at);
    ((packed_float*)(to.body + to.count))[at / INT8_BLOCK] = scale;
  }
  return -1;
}

inline u32 check(Source from) {
  const i8* codes = codes_of(from);
  u8 lowest = 0;
  for (int i = 0; i < CHUNK; ++i) lowest |= (u8)(codes[i] == -128);
  u32 faults = lowest ? CODE_MINUS_128 : 0u;
  const packed_u32* scales = (const packed_u32*)scales_of(from);
  for (int block = 0; block < BLOCKS; ++block) {
    if (!int8_scale_valid(scales[block])) faults |= scales[block] < INFINITE ? SCALE_TOO_LARGE : SCALE_INVALID;
  }
  return faults;
}

inline void decode_add(Source from, float weight, float* out) {
  const packed_float* scales = scales_of(from);
  for (int block = 0; block < BLOCKS; ++block) {
    const i8* __restrict codes = codes_of(from) + block * INT8_BLOCK;
    float* __restrict sums = out + from.chunk * CHUNK + block * INT8_BLOCK;
    const float scale = scales[block];
    for (int i = 0; i < INT8_BLOCK; ++i) sums[i] = weighted_sum(sums[i], weight, int8_value(codes[i], scale));
  }
}

inline int norm_terms(Source from, double* terms) {
  const packed_float* scales = scales_of(from);
  for (int block = 0; block < BLOCKS; ++block) {
    const i8* __restrict codes = codes_of(from) + block * INT8_BLOCK;
    i32 sum = 0;
    for (int i = 0; i < INT8_BLOCK; ++i) sum += (i32)codes[i] * codes[i];
    terms[block] = (double)sum * ((double)scales[block] * (double)scales[block]);
  }
  return BLOCKS;
}

}  // namespace int8
}  // namespace
}  // namespace psyche
