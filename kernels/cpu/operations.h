// Codecs on whole ranges: what the Python module and the fuzzer call.
#pragma once

#include <string>
#include <vector>

#include "codec.h"

namespace psyche {

// The instruction sets that both this build and this machine have, best first.
std::vector<const Level*> available_levels();

// The level of that name, or the best for an empty one; null where it is not available.
const Level* find_level(const std::string& name);

// The message of the PyTorch codec for the first of these faults.
const char* reason(u32 faults);

// A codec at one level. All ranges are of `count` values, a multiple of CHUNK, and all bodies of body_bytes(count).
class RangeCodec {
 public:
  // `name` as psyche/numerics/codecs/registry.py spells it, without topk2e. `valid` is false for any other name.
  RangeCodec(const std::string& name, const Level& level);

  bool valid() const { return chunks_ != nullptr; }
  int kept() const { return kept_; }
  i64 body_bytes(i64 count) const { return count / CHUNK * chunk_bytes_; }

  // Returns -1, or the position of the first value that is not finite; body and residual are then undefined.
  i64 encode(const Input& in, u8* body, i64 count, int threads) const;
  // Returns the faults of the body, 0 where it is valid.
  u32 check(const u8* body, i64 count, int threads) const;
  // Checks the body, then adds weight * D(body) to `out`. Writes nothing where it returns faults.
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

// Entropy-code a valid topk2 body of `chunks` chunks to at most `capacity` bytes. Returns their number, or -1 where they
// do not suffice.
i64 compress(int kept, const u8* body, i64 chunks, u8* out, i64 capacity);

// Decode a stream to a topk2 body of `chunks` chunks. Returns false for a stream that no encoder writes; the body is then
// undefined. Does not check levels.
bool expand(int kept, const u8* data, i64 size, i64 chunks, u8* body);

}  // namespace psyche
