// fp32, as psyche/numerics/codecs/fp32.py defines it. Part of level.cpp.
#pragma once

#include "range.h"

namespace psyche {
namespace {
namespace fp32 {

inline i64 encode(const Input& in, Target to) {
  const i64 at = to.chunk * CHUNK;
  float scratch[CHUNK];
  const Delta delta = delta_of(in, at, CHUNK, scratch);
  if (delta.largest >= INFINITE) return at + first_non_finite(delta.values);
  __builtin_memcpy(to.body + 4 * at, delta.values, sizeof scratch);
  if (in.residual) __builtin_memset(in.residual + at, 0, sizeof scratch);  // nothing was lost
  return -1;
}

inline u32 check(Source from) {
  const packed_u32* patterns = (const packed_u32*)from.body + from.chunk * CHUNK;
  i32 largest = 0;
  for (int i = 0; i < CHUNK; ++i) {
    const i32 magnitude = (i32)(patterns[i] & ~SIGN_BIT);
    largest = largest > magnitude ? largest : magnitude;
  }
  return (u32)largest >= INFINITE ? VALUE_NOT_FINITE : 0u;
}

inline void decode_add(Source from, float weight, float* out) {
  const packed_float* values = (const packed_float*)from.body + from.chunk * CHUNK;
  float* __restrict sums = out + from.chunk * CHUNK;
  for (int i = 0; i < CHUNK; ++i) sums[i] = weighted_sum(sums[i], weight, values[i]);
}

inline int norm_terms(Source from, double* terms) {
  const packed_float* values = (const packed_float*)from.body + from.chunk * CHUNK;
  for (int i = 0; i < CHUNK; ++i) terms[i] = (double)values[i] * (double)values[i];
  return CHUNK;
}

}  // namespace fp32
}  // namespace
}  // namespace psyche
