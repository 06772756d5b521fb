// topk2, as psyche/numerics/codecs/topk2.py defines it. Part of level.cpp.
#pragma once

#include "kept.h"
#include "range.h"
#include "select.h"
#include "two_levels.h"

namespace psyche {
namespace {
namespace topk2 {

inline i64 encode(const Input& in, Target to) {
  float scratch[CHUNK];
  const i64 start = to.chunk * CHUNK;
  const Delta delta = delta_of(in, start, CHUNK, scratch);
  if (delta.largest >= INFINITE) return start + first_non_finite(delta.values);
  const TopK2Layout layout = TopK2Layout::of(to.kept);
  Kept kept;
  alignas(64) float values[MAX_KEPT];
  select_largest(delta.values, to.kept, kept.index);
  for (int i = 0; i < to.kept; ++i) values[i] = delta.values[kept.index[i]];
  const TwoLevels found = split_levels(values, to.kept, delta.largest, kept.is_high, kept.is_negative);
  kept.low = found.low;
  kept.high = found.high;
  for (int i = 0; i < to.kept; ++i) delta.values[kept.index[i]] = values[i];
  write_kept(layout, kept, to.body + to.chunk * layout.bytes);
  return -1;
}

inline u32 check(Source from) {
  const TopK2Layout layout = TopK2Layout::of(from.kept);
  Kept kept;
  if (!read_kept(layout, from.body + from.chunk * layout.bytes, kept)) return INDEX_COUNT;
  u32 faults = level_faults(kept.low, kept.high);
  for (int i = 1; i < from.kept; ++i) {
    if (kept.index[i] <= kept.index[i - 1]) faults |= INDEX_ORDER;
  }
  return faults;
}

inline void decode_add(Source from, float weight, float* out) {
  const TopK2Layout layout = TopK2Layout::of(from.kept);
  Kept kept;
  if (!read_kept(layout, from.body + from.chunk * layout.bytes, kept)) return;  // never so: the body was checked
  float* sums = out + from.chunk * CHUNK;
  const float low = bf16_widened(kept.low), high = bf16_widened(kept.high);
  for (int i = 0; i < from.kept; ++i) {
    float& sum = sums[kept.index[i]];
    sum = weighted_sum(sum, weight, level_value(kept.is_high[i] ? high : low, kept.is_negative[i]));
  }
}

inline int norm_terms(Source from, double* terms) {
  const TopK2Layout layout = TopK2Layout::of(from.kept);
  const u8* chunk = from.body + from.chunk * layout.bytes;
  const packed_u16* levels = (const packed_u16*)chunk;
  terms[0] = two_level_term(from.kept, plane_ones(chunk + layout.magnitudes, from.kept / 8), levels[0], levels[1]);
  return 1;
}

}  // namespace topk2
}  // namespace
}  // namespace psyche
