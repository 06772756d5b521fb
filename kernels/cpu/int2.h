// int2, as psyche/numerics/codecs/int2.py defines it. Part of level.cpp.
#pragma once

#include "planes.h"
#include "range.h"
#include "two_levels.h"

namespace psyche {
namespace {
namespace int2 {

constexpr int BLOCKS = CHUNK / INT2_BLOCK;
constexpr int PLANE = INT2_BLOCK / 8;  // bytes of a block in each plane

// 2^i, for vectors that cannot shift each element by its own count.
alignas(64) constexpr u32 BIT[32] = {
    1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,  1u << 8,  1u << 9,  1u << 10,
    1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15, 1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21,
    1u << 22, 1u << 23, 1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31,
};

inline const packed_u16* levels_of(Source from) {
  return (const packed_u16*)(from.body + from.count / 4) + 2 * BLOCKS * from.chunk;
}

inline i64 encode(const Input& in, Target to) {
  float scratch[INT2_BLOCK];
  alignas(64) u8 is_high[INT2_BLOCK], is_negative[INT2_BLOCK];
  for (int block = 0; block < BLOCKS; ++block) {
    const i64 at = to.chunk * CHUNK + block * INT2_BLOCK;
    const Delta delta = delta_of(in, at, INT2_BLOCK, scratch);
    if (delta.largest >= INFINITE) return at + first_non_finite(delta.values);
    const TwoLevels found = split_levels(delta.values, INT2_BLOCK, delta.largest, is_high, is_negative);
    pack_plane(is_negative, INT2_BLOCK, to.body + at / 8);
    pack_plane(is_high, INT2_BLOCK, to.body + to.count / 8 + at / 8);
    packed_u16* levels = (packed_u16*)(to.body + to.count / 4) + 2 * (at / INT2_BLOCK);
    levels[0] = (u16)found.low;
    levels[1] = (u16)found.high;
  }
  return -1;
}

inline u32 check(Source from) {
  const packed_u16* levels = levels_of(from);
  u32 faults = 0;
  for (int block = 0; block < BLOCKS; ++block) faults |= level_faults(levels[2 * block], levels[2 * block + 1]);
  return faults;
}

inline void decode_add(Source from, float weight, float* out) {
  const packed_u16* levels = levels_of(from);
  for (int block = 0; block < BLOCKS; ++block) {
    const i64 at = from.chunk * CHUNK + block * INT2_BLOCK;
    const packed_u32* negative = (const packed_u32*)(from.body + at / 8);
    const packed_u32* high = (const packed_u32*)(from.body + from.count / 8 + at / 8);
    const u32 low_bits = bits_of(bf16_widened(levels[2 * block]));
    const u32 high_bits = bits_of(bf16_widened(levels[2 * block + 1]));
    for (int word = 0; word < INT2_BLOCK / 32; ++word) {
      const u32 signs = negative[word], highs = high[word];
      float* __restrict sums = out + at + 32 * word;
      for (int i = 0; i < 32; ++i) {
        const u32 level = highs & BIT[i] ? high_bits : low_bits;
        const u32 sign = signs & BIT[i] ? SIGN_BIT : 0u;
        sums[i] = weighted_sum(sums[i], weight, float_of(level ^ sign));
      }
    }
  }
}

inline int norm_terms(Source from, double* terms) {
  const packed_u16* levels = levels_of(from);
  const u8* high = from.body + from.count / 8 + from.chunk * BLOCKS * PLANE;
  for (int block = 0; block < BLOCKS; ++block) {
    const int n_high = plane_ones(high + block * PLANE, PLANE);
    terms[block] = two_level_term(INT2_BLOCK, n_high, levels[2 * block], levels[2 * block + 1]);
  }
  return BLOCKS;
}

}  // namespace int2
}  // namespace
}  // namespace psyche
