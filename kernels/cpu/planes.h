// Planes of bits: bit i of byte j is that of element 8j + i.
#pragma once

#include "codec.h"

namespace psyche {

// `n` bytes of 0 or 1 (n a multiple of 8) to n / 8 bytes.
static inline void pack_plane(const u8* flags, int n, u8* plane) {
  for (int i = 0; i < n; i += 8) {
    const u64 eight = *(const packed_u64*)(flags + i);
    plane[i / 8] = (u8)(eight * 0x0102040810204080ull >> 56);  // bit 8k of the eight moves to bit 56 + k
  }
}

static inline u32 plane_bit(const u8* plane, int i) { return plane[i >> 3] >> (i & 7) & 1u; }

// The number of ones in `bytes` bytes, a multiple of 4.
static inline int plane_ones(const u8* plane, int bytes) {
  int ones = 0;
  for (int i = 0; i < bytes; i += 4) ones += __builtin_popcount(*(const packed_u32*)(plane + i));
  return ones;
}

}  // namespace psyche
