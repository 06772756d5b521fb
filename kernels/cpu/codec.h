// What one instruction set offers, chunk by chunk. The formats are those of psyche/numerics/codecs.
#pragma once

#include "../include/psyche_numerics.h"

namespace psyche {

using i64 = long long;

// Bytes of a peer lie at any address. All machines that we build for are little-endian, as the formats are.
using packed_u16 = u16 __attribute__((aligned(1), may_alias));
using packed_u64 = u64 __attribute__((aligned(1), may_alias));
using packed_float = float __attribute__((aligned(1), may_alias));
using packed_u32 = u32 __attribute__((aligned(1), may_alias));

// Why a body is refused. Of several faults the lowest bit is the one that the PyTorch codec would report.
enum Fault : u32 {
  VALUE_NOT_FINITE = 1u << 0,
  SCALE_INVALID = 1u << 1,
  CODE_MINUS_128 = 1u << 2,
  SCALE_TOO_LARGE = 1u << 3,
  SCALE_OVERFLOWS = 1u << 4,
  SCALE_MINUS_ZERO = 1u << 5,
  INDEX_COUNT = 1u << 6,
  LEVEL_INVALID = 1u << 7,
  LEVEL_ORDER = 1u << 8,
  INDEX_ORDER = 1u << 9,
};

// What is encoded: beta * residual + (base - local), or base - local where `residual` is null. The residual becomes
// what quantization lost; it overlaps neither of the others.
struct Input {
  const float* base;
  const float* local;
  float* residual;
  float beta;
};

// A body of `count` values, and which chunk of it a function works on. `kept` matters to topk2 only.
template <class Byte>
struct Part {
  Byte* body;
  i64 count;
  i64 chunk;
  int kept;
};
using Source = Part<const u8>;
using Target = Part<u8>;

// Functions on one chunk of 4096 values. `encode` returns the position in the range of the chunk's first value that is
// not finite, or -1; `norm_terms` writes at most 4096 terms of the squared norm, in order, and returns their number.
struct ChunkCodec {
  i64 (*encode)(const Input&, Target);
  u32 (*check)(Source);
  void (*decode_add)(Source, float weight, float* out);
  int (*norm_terms)(Source, double* terms);
};

// One instruction set. `outer_step` is Nesterov's step on `n` values; the new theta also goes to `local` unless null.
struct Level {
  const char* name;
  ChunkCodec fp32, int8, int4, int4_32, int2, topk2;
  void (*outer_step)(float* theta, float* momentum, const float* gradient, float* local, i64 n, float lr, float mu);
};

}  // namespace psyche
