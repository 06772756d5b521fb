#include "operations.h"

#include "threads.h"

namespace psyche {

#if defined(PSYCHE_X86)
extern const Level avx512, avx2;
#endif
extern const Level baseline;

std::vector<const Level*> available_levels() {
  std::vector<const Level*> levels;
#if defined(PSYCHE_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi")) {
    levels.push_back(&avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi")) {
    levels.push_back(&avx2);
  }
#endif
  levels.push_back(&baseline);
  return levels;
}

const Level* find_level(const std::string& name) {
  for (const Level* level : available_levels()) {
    if (name.empty() || name == level->name) return level;
  }
  return nullptr;
}

const char* reason(u32 faults) {
  switch (faults & (0u - faults)) {
    case VALUE_NOT_FINITE: return "a value is NaN or infinite";
    case SCALE_INVALID: return "a scale is negative, NaN or infinite";
    case CODE_MINUS_128: return "a code is −128";
    case SCALE_TOO_LARGE: return "a scale is so large that its values would overflow";
    case SCALE_OVERFLOWS: return "a scale is NaN, infinite, or so large that its values would overflow";
    case SCALE_MINUS_ZERO: return "a scale is −0";
    case INDEX_COUNT: return "an index is out of range, or their number is wrong";
    case LEVEL_INVALID: return "a level is negative, NaN or infinite";
    case LEVEL_ORDER: return "a low level is above its high level";
    case INDEX_ORDER: return "an index is repeated or out of order";
    default: return nullptr;
  }
}

RangeCodec::RangeCodec(const std::string& name, const Level& level) {
  if (name == "fp32") chunks_ = &level.fp32;
  if (name == "int8") chunks_ = &level.int8;
  if (name == "int4") chunks_ = &level.int4;
  if (name == "int4-32") chunks_ = &level.int4_32;
  if (name == "int2") chunks_ = &level.int2;
  for (const int kept : {64, 256, 512}) {
    if (name == (kept == 64 ? "topk2" : "topk2-" + std::to_string(kept))) {
      chunks_ = &level.topk2;
      kept_ = kept;
    }
  }
  if (!chunks_) return;
  if (kept_) {
    chunk_bytes_ = TopK2Layout::of(kept_).bytes;
  } else if (name == "fp32") {
    chunk_bytes_ = 4 * CHUNK;
  } else if (name == "int8") {
    chunk_bytes_ = CHUNK + 4 * (CHUNK / INT8_BLOCK);
  } else if (name == "int2") {
    chunk_bytes_ = CHUNK / 4 + 4 * (CHUNK / INT2_BLOCK);
  } else {
    chunk_bytes_ = CHUNK / 2 + 2 * (CHUNK / (name == "int4" ? 128 : 32));
  }
}

i64 RangeCodec::encode(const Input& in, u8* body, i64 count, int threads) const {
  std::atomic<i64> first_bad{count};
  share_chunks(count / CHUNK, threads, [&](i64 first, i64 last) {
    for (i64 chunk = first; chunk < last && chunk * CHUNK < first_bad.load(std::memory_order_relaxed); ++chunk) {
      const i64 bad = chunks_->encode(in, Target{body, count, chunk, kept_});
      if (bad < 0) continue;
      i64 known = first_bad.load(std::memory_order_relaxed);
      while (bad < known && !first_bad.compare_exchange_weak(known, bad, std::memory_order_relaxed)) {
      }
    }
  });
  return first_bad < count ? first_bad.load() : -1;
}

u32 RangeCodec::check(const u8* body, i64 count, int threads) const {
  std::atomic<u32> faults{0};
  share_chunks(count / CHUNK, threads, [&](i64 first, i64 last) {
    u32 found = 0;
    for (i64 chunk = first; chunk < last; ++chunk) found |= chunks_->check(Source{body, count, chunk, kept_});
    faults.fetch_or(found, std::memory_order_relaxed);
  });
  return faults;
}

u32 RangeCodec::decode_add(const u8* body, i64 count, float weight, float* out, int threads) const {
  if (const u32 faults = check(body, count, threads)) return faults;
  share_chunks(count / CHUNK, threads, [&](i64 first, i64 last) {
    for (i64 chunk = first; chunk < last; ++chunk) chunks_->decode_add(Source{body, count, chunk, kept_}, weight, out);
  });
  return 0;
}

double RangeCodec::squared_norm(const u8* body, i64 count) const {
  double terms[CHUNK];
  double sum = 0.0;
  for (i64 chunk = 0; chunk < count / CHUNK; ++chunk) {
    const int n = chunks_->norm_terms(Source{body, count, chunk, kept_}, terms);
    for (int i = 0; i < n; ++i) sum += terms[i];
  }
  return sum;
}

void outer_step(const Level& level, float* theta, float* momentum, const float* gradient, float* local, i64 count,
                float lr, float mu, int threads) {
  const i64 whole = count / CHUNK * CHUNK;
  share_chunks(count / CHUNK, threads, [&](i64 first, i64 last) {
    const i64 at = first * CHUNK;
    level.outer_step(theta + at, momentum + at, gradient + at, local ? local + at : nullptr, (last - first) * CHUNK, lr,
                     mu);
  });
  level.outer_step(theta + whole, momentum + whole, gradient + whole, local ? local + whole : nullptr, count - whole,
                   lr, mu);
}

}  // namespace psyche
