// What every backend computes, value by value: the arithmetic of psyche/numerics/README.md, written once.
//
// CPU code and CUDA kernels both include this file; the PyTorch codecs in psyche/numerics/codecs are its definition.
// Every float operation below is one IEEE operation with one rounding (to nearest, ties to even) and subnormals kept:
// compile with -ffp-contract=off on the CPU; on a GPU the intrinsics cannot be contracted. Everything that could
// depend on an order of summation is done in integers. Nothing here needs a header of the C or C++ library, because
// NVRTC has none.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define PSYCHE_FN static __device__ __forceinline__
#else
// Always: a copy with external linkage, compiled for one instruction set, could be called on a machine without it.
#define PSYCHE_FN static inline __attribute__((always_inline))
#endif

namespace psyche {

using u8 = unsigned char;
using i8 = signed char;
using u16 = unsigned short;
using u32 = unsigned int;
using i32 = int;
using u64 = unsigned long long;

// ---------------------------------------------------------------------------------------- rounding

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
PSYCHE_FN float add(float a, float b) { return __fadd_rn(a, b); }
PSYCHE_FN float sub(float a, float b) { return __fsub_rn(a, b); }
PSYCHE_FN float mul(float a, float b) { return __fmul_rn(a, b); }
PSYCHE_FN float div(float a, float b) { return __fdiv_rn(a, b); }
PSYCHE_FN u32 bits_of(float x) { return __float_as_uint(x); }
PSYCHE_FN float float_of(u32 bits) { return __uint_as_float(bits); }
#else
PSYCHE_FN float add(float a, float b) { return a + b; }
PSYCHE_FN float sub(float a, float b) { return a - b; }
PSYCHE_FN float mul(float a, float b) { return a * b; }
PSYCHE_FN float div(float a, float b) { return a / b; }
PSYCHE_FN u32 bits_of(float x) {
  u32 bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
PSYCHE_FN float float_of(u32 bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
#endif

constexpr u32 SIGN_BIT = 0x80000000u;
constexpr u32 INFINITE = 0x7F800000u;  // magnitudes from here on are infinite or NaN

PSYCHE_FN u32 magnitude_bits(float x) { return bits_of(x) & ~SIGN_BIT; }
PSYCHE_FN u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }
PSYCHE_FN u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }

// Nearest integer, ties to even, for |x| < 2^21: adding 1.5 * 2^23 leaves it in the low bits of the sum.
PSYCHE_FN i32 nearest_int(float x) { return (i32)(bits_of(add(x, 12582912.0f)) - 0x4B400000u); }

PSYCHE_FN float clamped(float x, float lowest, float highest) {
  x = x < lowest ? lowest : x;
  return x > highest ? highest : x;
}

// ------------------------------------------------------------------- error feedback, sums, outer step

// What is encoded: beta * e + (base - local), or without error feedback base - local.
PSYCHE_FN float with_feedback(float base, float local, float residual, float beta) {
  return add(mul(residual, beta), sub(base, local));
}

PSYCHE_FN float weighted_sum(float sum, float weight, float value) { return add(sum, mul(value, weight)); }

// Nesterov (DiLoCo, arXiv 2311.08105, section 3): m <- mu m + g; theta <- theta - lr (g + mu m).
PSYCHE_FN void outer_step(float& theta, float& momentum, float gradient, float lr, float mu) {
  momentum = add(mul(momentum, mu), gradient);
  theta = sub(theta, mul(add(mul(momentum, mu), gradient), lr));
}

// -------------------------------------------------------------------------------------------- bf16

constexpr u32 BF16_LARGEST = 0x7F7Fu;
constexpr u32 BF16_INFINITE = 0x7F80u;
constexpr u32 BF16_SIGN = 0x8000u;

// Bits of the nearest bf16, ties to even, magnitude at most `largest`; zero loses its sign.
PSYCHE_FN u32 bf16_rounded(float x, u32 largest) {
  const u32 magnitude = magnitude_bits(x);
  const u32 nearest = min_u32((magnitude + 0x7FFFu + ((magnitude >> 16) & 1u)) >> 16, largest);
  return nearest == 0 ? 0u : nearest | ((bits_of(x) & SIGN_BIT) >> 16);
}
PSYCHE_FN float bf16_widened(u32 pattern) { return float_of(pattern << 16); }

// -------------------------------------------------------------------------------------------- int8

constexpr int INT8_BLOCK = 256;
constexpr u32 INT8_MAX_SCALE = 0x7C010203u;  // the largest fp32 of which 127 times is finite

PSYCHE_FN float int8_scale(u32 largest_magnitude_bits) {
  return float_of(min_u32(bits_of(div(float_of(largest_magnitude_bits), 127.0f)), INT8_MAX_SCALE));
}
PSYCHE_FN i32 int8_code(float x, float scale) {
  const float quotient = scale > 0.0f ? div(x, scale) : 0.0f;
  return nearest_int(clamped(quotient, -127.0f, 127.0f));
}
PSYCHE_FN float int8_value(i32 code, float scale) { return mul((float)code, scale); }
PSYCHE_FN bool int8_scale_valid(u32 bits) { return bits <= INT8_MAX_SCALE; }  // negative, NaN and infinite are above

// -------------------------------------------------------------------------------------------- int4

constexpr u32 INT4_MAX_SCALE = BF16_LARGEST - (3u << 7);  // the largest bf16 of which 8 times is finite

// bf16 bits. `highest` and `lowest` are the block's extremes.
PSYCHE_FN u32 int4_scale(float highest, float lowest) {
  const float peak = highest >= -lowest ? highest : lowest;
  return bf16_rounded(mul(peak, -0.125f), INT4_MAX_SCALE);
}
PSYCHE_FN i32 int4_code(float x, float scale) {
  const float quotient = scale != 0.0f ? div(x, scale) : 0.0f;
  return nearest_int(clamped(quotient, -8.0f, 7.0f));
}
PSYCHE_FN i32 int4_signed(u32 nibble) { return (i32)(nibble ^ 8u) - 8; }
PSYCHE_FN float int4_value(i32 code, float scale) { return mul((float)code, scale); }
PSYCHE_FN bool int4_scale_valid(u32 bits) { return (bits & 0x7FFFu) <= INT4_MAX_SCALE && bits != BF16_SIGN; }

// ------------------------------------------------------------------- two levels (int2 and topk2)

constexpr int INT2_BLOCK = 256;
constexpr int LEVEL_ITERATIONS = 4;
constexpr int LEVEL_FRACTION = 21;

// The biased exponent that a group's magnitudes are relative to.
PSYCHE_FN u32 level_top(u32 largest_magnitude_bits) { return max_u32(largest_magnitude_bits >> 23, 1u); }

// A magnitude in units of 2^(top - 147), truncated: below 2^21, so that 512 of them add up in 32 bits.
PSYCHE_FN u32 level_fixed(u32 magnitude, u32 top) {
  const u32 exponent = magnitude >> 23;
  const u32 fraction = magnitude & 0x7FFFFFu;
  const u32 significand = exponent > 0 ? fraction | 0x800000u : fraction;
  return significand >> min_u32(top - max_u32(exponent, 1u) + (24 - LEVEL_FRACTION), 31u);
}

// Lloyd's algorithm between two groups. Feed `step` the sum and number of fixed-point magnitudes above `threshold`,
// LEVEL_ITERATIONS times; then `low`, `high` are the levels and magnitudes above `threshold` take the high one.
struct Levels {
  u32 total, count, threshold, low, high;
  bool has_zero;  // then the low level is zero, so that zeros stay what they are

  PSYCHE_FN Levels start(u32 total, u32 count, bool has_zero) {
    const u32 mean = total / count;
    return Levels{total, count, mean, mean, mean, has_zero};
  }
  PSYCHE_FN void step(Levels& levels, u32 sum_high, u32 n_high) {
    levels.low = levels.has_zero ? 0u : (levels.total - sum_high) / (levels.count - n_high);
    levels.high = n_high > 0 ? sum_high / n_high : levels.low;
    levels.threshold = (levels.low + levels.high) >> 1;
  }
};

// bf16 bits of a level: exact in fp32 unless subnormal (then rounded once), then rounded to bf16.
PSYCHE_FN u32 level_bf16(u32 fixed, u32 top) {
  const i32 exponent = (i32)top - (126 + LEVEL_FRACTION);
  const i32 half = exponent >> 1;  // two steps, because the power of two alone may be out of range
  const float first = mul((float)fixed, float_of((u32)(half + 127) << 23));
  return bf16_rounded(mul(first, float_of((u32)(exponent - half + 127) << 23)), BF16_LARGEST);
}
PSYCHE_FN float level_value(float level, bool negative) { return negative ? -level : level; }
PSYCHE_FN bool levels_valid(u32 low, u32 high) { return low <= high && high < BF16_INFINITE; }

// ------------------------------------------------------------------------------------------- topk2

constexpr int CHUNK = 4096;

// Where the parts of a chunk of the body lie, in bytes; `kept` is 64, 256 or 512.
struct TopK2Layout {
  int kept, low_bits, upper, lower, signs, magnitudes, bytes;

  PSYCHE_FN constexpr TopK2Layout of(int kept) {
    int low_bits = 0;
    while ((kept << low_bits) < CHUNK) ++low_bits;
    const int lower = 4 + kept / 4, signs = lower + kept * low_bits / 8;
    return TopK2Layout{kept, low_bits, 4, lower, signs, signs + kept / 8, signs + kept / 4};
  }
};

}  // namespace psyche
