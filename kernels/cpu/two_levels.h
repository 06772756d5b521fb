// Two levels for a group of values, as psyche/numerics/codecs/levels.py defines them. Part of level.cpp.
#pragma once

#include "codec.h"

namespace psyche {
namespace {

constexpr int MAX_GROUP = 512;

struct TwoLevels {
  u32 low, high;  // bf16 bits
};

// Levels of `n` finite values, n at most MAX_GROUP. `is_high`, `is_negative` get a 1 or a 0 for each value, which
// becomes what its level leaves of it.
inline TwoLevels split_levels(float* values, int n, u32 largest, u8* is_high, u8* is_negative) {
  alignas(64) u32 fixed[MAX_GROUP];
  const u32 top = level_top(largest);
  u32 total = 0, zeros = 0;
  for (int i = 0; i < n; ++i) {
    const u32 magnitude = magnitude_bits(values[i]);
    fixed[i] = level_fixed(magnitude, top);
    total += fixed[i];
    zeros += magnitude == 0;
  }
  Levels levels = Levels::start(total, (u32)n, zeros > 0);
  for (int iteration = 0; iteration < LEVEL_ITERATIONS; ++iteration) {
    u32 sum_high = 0, n_high = 0;
    for (int i = 0; i < n; ++i) {
      const bool above = (i32)fixed[i] > (i32)levels.threshold;  // signed: both are below 2^21, and SSE2 compares so
      sum_high += above ? fixed[i] : 0u;
      n_high += above;
    }
    Levels::step(levels, sum_high, n_high);
  }
  const TwoLevels found{level_bf16(levels.low, top), level_bf16(levels.high, top)};
  const float low = bf16_widened(found.low), high = bf16_widened(found.high);
  for (int i = 0; i < n; ++i) {
    const bool above = (i32)fixed[i] > (i32)levels.threshold, negative = values[i] < 0.0f;
    is_high[i] = above;
    is_negative[i] = negative;
    values[i] = sub(values[i], level_value(above ? high : low, negative));
  }
  return found;
}

inline u32 level_faults(u32 low, u32 high) {
  if (levels_valid(low, high)) return 0;
  return low >= BF16_INFINITE || high >= BF16_INFINITE ? LEVEL_INVALID : LEVEL_ORDER;
}

inline double two_level_term(int n, int n_high, u32 low, u32 high) {
  const double l = bf16_widened(low), h = bf16_widened(high);
  return (double)(n - n_high) * (l * l) + (double)n_high * (h * h);
}

}  // namespace
}  // namespace psyche
