// One chunk of a topk2 body, to and from its parts: psyche/numerics/codecs/topk2.py describes the format.
#pragma once

#include "codec.h"
#include "planes.h"

namespace psyche {

constexpr int MAX_KEPT = 512;

struct Kept {
  u32 low, high;            // levels, bf16 bits
  u16 index[MAX_KEPT];      // within the chunk
  u8 is_high[MAX_KEPT];     // 1 or 0
  u8 is_negative[MAX_KEPT];
};

static inline void write_kept(const TopK2Layout& layout, const Kept& kept, u8* chunk) {
  __builtin_memset(chunk, 0, (unsigned long)layout.bytes);
  ((packed_u16*)chunk)[0] = (u16)kept.low;
  ((packed_u16*)chunk)[1] = (u16)kept.high;
  u8* upper = chunk + layout.upper;
  u8* lower = chunk + layout.lower;
  const u32 low_mask = (1u << layout.low_bits) - 1u;
  for (int i = 0; i < layout.kept; ++i) {
    const int bit = (kept.index[i] >> layout.low_bits) + i;
    upper[bit >> 3] |= (u8)(1u << (bit & 7));
    const int at = i * layout.low_bits;  // 7 bits at most: they touch two bytes, and signs follow the last
    packed_u16* two = (packed_u16*)(lower + (at >> 3));
    *two = (u16)(*two | (kept.index[i] & low_mask) << (at & 7));
  }
  pack_plane(kept.is_negative, layout.kept, chunk + layout.signs);
  pack_plane(kept.is_high, layout.kept, chunk + layout.magnitudes);
}

// False where the number of indices is wrong or the last one is out of range; `kept` is then undefined.
static inline bool read_kept(const TopK2Layout& layout, const u8* chunk, Kept& kept) {
  const u8* upper = chunk + layout.upper;
  if (plane_ones(upper, layout.kept / 4) != layout.kept || plane_bit(upper, 2 * layout.kept - 1)) return false;
  const u32 low_mask = (1u << layout.low_bits) - 1u;
  kept.low = ((const packed_u16*)chunk)[0];
  kept.high = ((const packed_u16*)chunk)[1];
  int i = 0;
  for (int word = 0; word < layout.kept / 32; ++word) {
    for (u64 rest = ((const packed_u64*)upper)[word]; rest; rest &= rest - 1, ++i) {
      const int bucket = 64 * word + __builtin_ctzll(rest) - i;
      const int at = i * layout.low_bits;
      const u32 two = *(const packed_u16*)(chunk + layout.lower + (at >> 3));
      kept.index[i] = (u16)((u32)bucket << layout.low_bits | (two >> (at & 7) & low_mask));
      kept.is_negative[i] = (u8)plane_bit(chunk + layout.signs, i);
      kept.is_high[i] = (u8)plane_bit(chunk + layout.magnitudes, i);
    }
  }
  return true;
}

}  // namespace psyche
