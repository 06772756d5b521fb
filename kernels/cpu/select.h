// Which values of a chunk are kept: those of largest magnitude, of equal ones the first. Part of level.cpp.
#pragma once

#include "codec.h"

namespace psyche {
namespace {

using i16 = short;

inline int count_at_least(const i16* keys, int n, i16 least) {
  i16 count = 0;  // at most 4096
  for (int i = 0; i < n; ++i) count = (i16)(count + (keys[i] >= least));
  return count;
}

// The largest t of which at least `wanted` of `n` keys are at least t, n and wanted at least 1: bisection on counts.
// It takes the same 15 or 16 passes whatever the data, each over at most 8 KB.
inline i16 kth_largest(const i16* keys, int n, int wanted, i32 lowest) {
  i32 low = lowest, high = 0x8000;  // at least `wanted` are at or above low, fewer at or above high
  while (high - low > 1) {
    const i32 middle = (low + high) >> 1;
    if (count_at_least(keys, n, (i16)middle) >= wanted) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return (i16)low;
}

// Two halves of a magnitude's bits, as integers of the same order.
inline i16 upper_key(u32 magnitude) { return (i16)(magnitude >> 16); }
inline i16 lower_key(u32 magnitude) { return (i16)((magnitude & 0xFFFFu) ^ 0x8000u); }

// Indices of the values whose upper half is at least `least`, ascending; returns their number.
inline int collect(const i16* keys, i16 least, u16* indices) {
  alignas(64) u8 found[CHUNK];
  for (int i = 0; i < CHUNK; ++i) found[i] = keys[i] >= least;
  int n = 0;
  for (int i = 0; i < CHUNK; i += 8) {
    for (u64 eight = *(const packed_u64*)(found + i); eight; eight &= eight - 1) {
      indices[n++] = (u16)(i + (__builtin_ctzll(eight) >> 3));
    }
  }
  return n;
}

// `kept` indices, ascending, of the values of largest magnitude in a chunk of finite ones.
inline void select_largest(const float* values, int kept, u16* indices) {
  alignas(64) i16 keys[CHUNK];
  alignas(64) u16 candidates[CHUNK];
  for (int i = 0; i < CHUNK; ++i) keys[i] = upper_key(magnitude_bits(values[i]));
  const i16 upper = kth_largest(keys, CHUNK, kept, 0);
  const int n = collect(keys, upper, candidates);
  if (n == kept) {
    __builtin_memcpy(indices, candidates, sizeof(u16) * (unsigned)kept);
    return;
  }
  // More than enough: of those with the least upper half, the largest lower halves and then the first.
  alignas(64) i16 ties[CHUNK];
  int n_ties = 0;
  for (int i = 0; i < n; ++i) {
    if (keys[candidates[i]] == upper) ties[n_ties++] = lower_key(magnitude_bits(values[candidates[i]]));
  }
  const int wanted = kept - (n - n_ties);
  const i16 lower = kth_largest(ties, n_ties, wanted, -0x8000);
  int equal = wanted;
  for (int i = 0; i < n_ties; ++i) equal -= ties[i] > lower;
  int tie = 0, taken = 0;
  for (int i = 0; i < n; ++i) {
    if (keys[candidates[i]] == upper) {
      const i16 key = ties[tie++];
      if (key < lower || (key == lower && equal-- <= 0)) continue;
    }
    indices[taken++] = candidates[i];
  }
}

}  // namespace
}  // namespace psyche
