// Arithmetic modulo p = 2^255 - 19, on the curve -x^2 + y^2 = 1 + d x^2 y^2, and Pippenger's way to add many multiples.
#include "operations.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace psyche {
namespace {

using u64 = unsigned long long;
__extension__ typedef unsigned __int128 u128;

constexpr u64 LOW = (1ull << 51) - 1;

// Limbs of 51 bits. Products leave limbs below 2^52; factors may have limbs below 2^54.
struct Field {
  u64 limb[5];
};

constexpr Field ZERO = {{0, 0, 0, 0, 0}}, ONE = {{1, 0, 0, 0, 0}};

Field carried(const u128 sum[5]) {
  Field out;
  u128 carry = 0;
  for (int i = 0; i < 5; ++i) {
    const u128 value = sum[i] + carry;
    out.limb[i] = static_cast<u64>(value) & LOW;
    carry = value >> 51;
  }
  // 2^255 is 19. The carry is below 2^68, so that it may take two limbs.
  const u128 first = out.limb[0] + carry * 19;
  out.limb[0] = static_cast<u64>(first) & LOW;
  out.limb[1] += static_cast<u64>(first >> 51);
  return out;
}

Field operator*(const Field& a, const Field& b) {
  u64 times19[5];
  for (int i = 0; i < 5; ++i) times19[i] = 19 * b.limb[i];
  u128 sum[5];
  for (int i = 0; i < 5; ++i) {
    sum[i] = 0;
    for (int j = 0; j < 5; ++j) sum[i] += static_cast<u128>(a.limb[j]) * (j <= i ? b.limb[i - j] : times19[5 + i - j]);
  }
  return carried(sum);
}

Field square(const Field& a) {
  const u64* x = a.limb;
  const u64 x0 = 2 * x[0], x1 = 2 * x[1], x3 = 19 * x[3], x4 = 19 * x[4];
  const u128 sum[5] = {
      static_cast<u128>(x[0]) * x[0] + static_cast<u128>(x1) * x4 + static_cast<u128>(2 * x[2]) * x3,
      static_cast<u128>(x0) * x[1] + static_cast<u128>(2 * x[2]) * x4 + static_cast<u128>(x[3]) * x3,
      static_cast<u128>(x0) * x[2] + static_cast<u128>(x[1]) * x[1] + static_cast<u128>(2 * x[3]) * x4,
      static_cast<u128>(x0) * x[3] + static_cast<u128>(x1) * x[2] + static_cast<u128>(x[4]) * x4,
      static_cast<u128>(x0) * x[4] + static_cast<u128>(x1) * x[3] + static_cast<u128>(x[2]) * x[2],
  };
  return carried(sum);
}

Field operator+(const Field& a, const Field& b) {
  Field out;
  for (int i = 0; i < 5; ++i) out.limb[i] = a.limb[i] + b.limb[i];
  return out;
}

// Limbs of b are below 2^52: those of 4p are greater.
Field operator-(const Field& a, const Field& b) {
  Field out;
  for (int i = 0; i < 5; ++i) out.limb[i] = a.limb[i] + (i ? 4 * LOW : 4 * (LOW - 18)) - b.limb[i];
  return out;
}

// The same with limbs as a product has them.
Field reduced(const Field& a) {
  u128 sum[5];
  for (int i = 0; i < 5; ++i) sum[i] = a.limb[i];
  return carried(sum);
}

void encode(const Field& a, u8 out[32]) {
  Field value = reduced(reduced(a));
  // value < 2^255 + small; adding 19 carries out of the top exactly where it is p or more.
  for (int round = 0; round < 2; ++round) {
    u64 carry = 19;
    for (int i = 0; i < 5; ++i) carry = (value.limb[i] + carry) >> 51;
    carry *= 19;
    for (int i = 0; i < 5; ++i) {
      carry += value.limb[i];
      value.limb[i] = carry & LOW;
      carry >>= 51;
    }
  }
  std::memset(out, 0, 32);
  for (int bit = 0; bit < 255; ++bit) out[bit / 8] |= static_cast<u8>((value.limb[bit / 51] >> (bit % 51) & 1) << bit % 8);
}

Field decode(const u8 in[32]) {
  Field out = ZERO;
  for (int bit = 0; bit < 255; ++bit) out.limb[bit / 51] |= static_cast<u64>(in[bit / 8] >> bit % 8 & 1) << bit % 51;
  return out;
}

bool equal(const Field& a, const Field& b) {
  u8 one[32], other[32];
  encode(a, one);
  encode(b, other);
  return std::memcmp(one, other, 32) == 0;
}

// x^(2^n - 1): the exponent is n ones.
Field ones(const Field& x, int n) {
  if (n == 1) return x;
  if (n % 2) return square(ones(x, n - 1)) * x;
  const Field half = ones(x, n / 2);
  Field out = half;
  for (int i = 0; i < n / 2; ++i) out = square(out);
  return out * half;
}

// x^((p - 5) / 8), whose exponent is 2^252 - 3.
Field root_power(const Field& x) { return square(square(ones(x, 250))) * x; }

Field small(u64 value) { return {{value, 0, 0, 0, 0}}; }

struct Constants {
  Field d, twice_d, root_of_minus_one;

  Constants() {
    // 1 / x is x^(p - 2), whose exponent 2^255 - 21 is 250 ones, then 01011.
    const Field x = small(121666);
    Field inverse = square(ones(x, 250));
    inverse = square(square(inverse) * x);
    inverse = square(square(inverse) * x) * x;
    d = reduced(ZERO - small(121665) * inverse);
    twice_d = reduced(d + d);
    // 2 is no square: 2^((p - 1) / 2) is -1. (p - 1) / 4 is 2 * (p - 5) / 8 + 1.
    root_of_minus_one = square(root_power(small(2))) * small(2);
  }
};

const Constants& constants() {
  static const Constants made;
  return made;
}

// x = X / Z, y = Y / Z, T = X Y / Z.
struct Point {
  Field x, y, z, t;
};

constexpr Point IDENTITY = {ZERO, ONE, ONE, ZERO};

// A point with Z = 1, as it is added.
struct Addend {
  Field difference, sum, product;  // y - x, y + x, 2 d x y
};

// The addition law (Hisil and others, 2008) is complete on this curve: it doubles, and adds the identity, as well.
Point added(const Field& a, const Field& b, const Field& c, const Field& d) {
  const Field e = b - a, f = d - c, g = d + c, h = b + a;
  return {e * f, g * h, f * g, e * h};
}

Point operator+(const Point& p, const Addend& q) {
  return added((p.y - p.x) * q.difference, (p.y + p.x) * q.sum, p.t * q.product, p.z + p.z);
}

Point operator+(const Point& p, const Point& q) {
  const Field product = p.z * q.z;
  return added((p.y - p.x) * (q.y - q.x), (p.y + p.x) * (q.y + q.x), p.t * q.t * constants().twice_d, product + product);
}

bool read_point(const u8 in[32], Addend& out) {
  const Constants& known = constants();
  const Field y = decode(in), y2 = square(y);
  u8 again[32];
  encode(y, again);
  if (std::memcmp(again, in, 31) != 0 || again[31] != (in[31] & 127)) return false;  // p or more
  const Field u = reduced(y2 - ONE), v = reduced(y2 * known.d + ONE);
  const Field v3 = square(v) * v;
  Field x = u * v3 * root_power(u * square(v3) * v);
  const Field check = v * square(x);
  if (!equal(check, u)) {
    if (!equal(check, ZERO - u)) return false;
    x = x * known.root_of_minus_one;
  }
  encode(x, again);
  const bool negative = in[31] >> 7;
  if (negative && equal(x, ZERO)) return false;
  if ((again[0] & 1) != negative) x = reduced(ZERO - x);
  out = {reduced(y - x), reduced(y + x), x * y * known.twice_d};
  return true;
}

// `width` bits of a scalar from `bit` on.
unsigned digit(const u8 scalar[32], int bit, int width) {
  unsigned found = 0;
  for (int i = 0; i < 4 && bit / 8 + i < 32; ++i) found |= static_cast<unsigned>(scalar[bit / 8 + i]) << 8 * i;
  return found >> bit % 8 & ((1u << width) - 1);
}

// Bits that are taken at a time: what a bucket costs is shared by the points in it.
int width_for(i64 count) {
  int width = 2;
  while (width < 12 && count >> (width + 2)) ++width;
  return width;
}

}  // namespace

bool vanishes(const u8* points, const u8* scalars, i64 count) {
  std::vector<Addend> addends(static_cast<std::size_t>(count));
  for (i64 i = 0; i < count; ++i)
    if (!read_point(points + 32 * i, addends[static_cast<std::size_t>(i)])) return false;
  const int width = width_for(count);
  std::vector<Point> buckets(std::size_t{1} << width);
  Point total = IDENTITY;
  for (int bit = (256 + width - 1) / width * width - width; bit >= 0; bit -= width) {
    for (int i = 0; i < width; ++i) total = total + total;
    std::fill(buckets.begin(), buckets.end(), IDENTITY);
    unsigned most = 0;
    for (i64 i = 0; i < count; ++i) {
      const unsigned value = digit(scalars + 32 * i, bit, width);
      if (value == 0) continue;
      buckets[value] = buckets[value] + addends[static_cast<std::size_t>(i)];
      if (value > most) most = value;
    }
    // Each bucket as often as its number says: running sums from the greatest down.
    Point running = IDENTITY, sum = IDENTITY;
    for (unsigned value = most; value > 0; --value) {
      running = running + buckets[value];
      sum = sum + running;
    }
    total = total + sum;
  }
  for (int i = 0; i < 3; ++i) total = total + total;
  return equal(total.x, ZERO) && equal(total.y, total.z);
}

}  // namespace psyche
