// Hostile bodies against the native decoders: sound ones of every codec, damaged, and random bytes. Built with
// sanitizers by scripts/fuzz_native.sh. Buffers are on the heap and exactly as large as what they hold.
//
// What must hold of every case: nothing is read or written out of bounds; where a fault is found `out` stays as it
// was; where none is, all values are finite; instruction sets agree.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "operations.h"

using namespace psyche;

namespace {

// xorshift64* (Vigna, arXiv 1402.6246)
struct Random {
  u64 state;
  u64 next() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545F4914F6CDD1Dull;
  }
  u64 below(u64 n) { return n ? (next() >> 16) % n : 0; }
};

using Buffer = std::vector<u8>;

struct Subject {
  std::string name;
  bool coded;  // topk2e: bodies are streams of the entropy coder
  std::vector<RangeCodec> levels;
  std::vector<Buffer> sound[3];  // by number of chunks
};

[[noreturn]] void fail(const Subject& subject, const char* what) {
  std::fprintf(stderr, "%s: %s\n", subject.name.c_str(), what);
  std::abort();
}

std::vector<float> values(Random& random, i64 count) {
  std::vector<float> made(static_cast<std::size_t>(count));
  const int style = (int)random.below(4);
  for (float& value : made) {
    const u64 r = random.next();
    const float uniform = (float)(i64)(r >> 40) * 0x1p-24f - 0.5f;
    value = style == 0   ? uniform
            : style == 1 ? (float)((int)(r & 3) - 1)                        // ties
            : style == 2 ? float_of((u32)r & (SIGN_BIT | 0x7F7FFFFFu))      // any magnitude, subnormals and zeros too
                         : uniform * uniform * uniform * uniform * uniform; // heavy tails
    if (magnitude_bits(value) >= INFINITE) value = 0.0f;
  }
  return made;
}

Subject subject(const std::string& name, bool coded, Random& random) {
  Subject made{coded ? "topk2e of " + name : name, coded, {}, {}};
  for (const Level* level : available_levels()) made.levels.emplace_back(name, *level);
  for (i64 chunks = 1; chunks <= 2; ++chunks) {
    while (made.sound[chunks].size() < 8) {
      const i64 count = chunks * CHUNK;
      const std::vector<float> base = values(random, count), local(static_cast<std::size_t>(count));
      const RangeCodec& codec = made.levels[0];
      Buffer body(static_cast<std::size_t>(codec.body_bytes(count)));
      if (codec.encode(Input{base.data(), local.data(), nullptr, 0.0f}, body.data(), count, 1) >= 0) abort();
      if (coded) {
        Buffer stream(body.size() + 64);
        const i64 size = compress(codec.kept(), body.data(), chunks, stream.data(), (i64)stream.size());
        if (size < 0) continue;
        stream.resize(static_cast<std::size_t>(size));
        body = stream;
      }
      made.sound[chunks].push_back(body);
    }
  }
  return made;
}

void damage(Random& random, Buffer& bytes) {
  if (random.below(16) == 0) {
    for (u8& byte : bytes) byte = (u8)random.next();
    return;
  }
  for (u64 times = random.below(5); times > 0 && !bytes.empty(); --times) {
    const u64 at = random.below(bytes.size());
    switch (random.below(6)) {
      case 0: bytes[at] ^= (u8)(1u << random.below(8)); break;
      case 1: bytes[at] = (u8)random.next(); break;
      case 2: bytes[at] = random.below(2) ? 0xFF : 0x00; break;
      case 3: std::swap(bytes[at], bytes[random.below(bytes.size())]); break;
      case 4: {  // towards the end, where scales and levels lie
        bytes[bytes.size() - 1 - random.below(std::min<u64>(bytes.size(), 256))] = (u8)random.next();
        break;
      }
      default: {
        const u64 from = random.below(bytes.size()), n = random.below(std::min(bytes.size() - at, bytes.size() - from));
        std::memmove(&bytes[at], &bytes[from], n);
      }
    }
  }
}

// Whether the body was accepted.
bool try_body(const Subject& subject, const u8* body, i64 count, Random& random) {
  const RangeCodec& codec = subject.levels[random.below(subject.levels.size())];
  const RangeCodec& other = subject.levels[random.below(subject.levels.size())];
  const u32 faults = codec.check(body, count, 1);
  if (faults && !reason(faults)) fail(subject, "a fault without a reason");
  static float untouched[2 * CHUNK];  // zeros
  const std::size_t bytes = sizeof(float) * static_cast<std::size_t>(count);
  const std::unique_ptr<float[]> out(new float[static_cast<std::size_t>(count)]());
  if (other.decode_add(body, count, 0.5f, out.get(), 1) != faults) fail(subject, "two instruction sets disagree");
  if (faults) {
    if (std::memcmp(out.get(), untouched, bytes) != 0) fail(subject, "a refused body was added");
    return false;
  }
  u32 not_finite = 0;
  for (i64 i = 0; i < count; ++i) not_finite |= magnitude_bits(out[i]) >= INFINITE;
  if (not_finite) fail(subject, "an accepted body has a value that is not finite");
  const double norm = codec.squared_norm(body, count);
  if (!(norm >= 0.0 && norm < 1e300)) fail(subject, "the norm of an accepted body is not finite");
  return true;
}

bool try_case(const Subject& subject, Random& random) {
  const i64 chunks = random.below(8) == 0 ? 2 : 1, count = chunks * CHUNK;
  Buffer bytes = subject.sound[chunks][random.below(subject.sound[chunks].size())];
  if (subject.coded && random.below(4) == 0) bytes.resize(random.below(bytes.size() + 8));
  damage(random, bytes);
  const std::unique_ptr<u8[]> exact(new u8[bytes.size()]);
  std::memcpy(exact.get(), bytes.data(), bytes.size());
  if (!subject.coded) return try_body(subject, exact.get(), count, random);
  const std::unique_ptr<u8[]> body(new u8[static_cast<std::size_t>(subject.levels[0].body_bytes(count))]);
  return expand(subject.levels[0].kept(), exact.get(), (i64)bytes.size(), chunks, body.get()) &&
         try_body(subject, body.get(), count, random);
}

}  // namespace

int main(int argc, char** argv) {
  const u64 cases = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 10000000;
  Random random{argc > 2 ? std::strtoull(argv[2], nullptr, 10) | 1 : 0x9E3779B97F4A7C15ull};
  std::vector<Subject> subjects;
  for (const char* name : {"fp32", "int8", "int4", "int4-32", "int2"}) {
    subjects.push_back(subject(name, false, random));
  }
  for (const char* name : {"topk2", "topk2-256", "topk2-512"}) {
    subjects.push_back(subject(name, false, random));
    subjects.push_back(subject(name, true, random));
  }
  std::vector<u64> tried(subjects.size()), accepted(subjects.size());
  const auto start = std::chrono::steady_clock::now();
  for (u64 i = 0; i < cases; ++i) {
    const u64 which = i % subjects.size();
    ++tried[which];
    accepted[which] += try_case(subjects[which], random);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  for (std::size_t i = 0; i < subjects.size(); ++i) {
    std::printf("%-18s %llu cases, %llu accepted\n", subjects[i].name.c_str(), tried[i], accepted[i]);
  }
  std::printf("%llu cases in %.0f s, nothing found\n", cases, seconds);
}
