// Codecs on whole ranges: what the Python module and the fuzzer call.
#pragma once

#include <string>
#include <vector>

#include "codec.h"

namespace psyche {

// Instruction sets that this build has and this machine can run, best first.
std::vector<const Level*> available_levels();

// The level of that name, or the best for an empty one; null where it is not available.
const Level* find_level(const std::string& name);

// What the PyTorch codec says of the first of these faults.
const char* reason(u32 faults);

// A codec at one level. All ranges are of `count` values, a multiple of CHUNK, and all bodies of body_bytes(count).
class RangeCodec {
 public:
  // `name` as psyche/numerics/codecs/names.py spells it, without topk2e. False from `valid` for any other.
  RangeCodec(const std::string& name, const Level& level);

  bool valid() const { return chunks_ != nullptr; }
  int kept() const { return kept_; }
  i64 body_bytes(i64 count) const { return count / CHUNK * chunk_bytes_; }

  // The position of the first value that is not finite, or -1. Otherwise the body is undefined, and the residual too.
  i64 encode(const Input& in, u8* body, i64 count, int threads) const;
  // Faults of the body, 0 where it is sound.
  u32 check(const u8* body, i64 count, int threads) const;
  // Checks, then adds weight * D(body) to `out`. Where faults are returned nothing was written.
  u32 decode_add(const u8* body, i64 count, float weight, float* out, int threads) const;
  // The squared norm of D(body), added in fp64 in block order. Any body of the right size can be read.
  double squared_norm(const u8* body, i64 count) const;

 private:
  const ChunkCodec* chunks_ = nullptr;
  int kept_ = 0;
  int chunk_bytes_ = 0;
};

void outer_step(const Level& level, float* theta, float* momentum, const float* gradient, float* local, i64 count,
                float lr, float mu, int threads);

}  // namespace psyche
