// The adaptive binary range coder of psyche/numerics/codecs/rangecoder.py, which explains it. The same bytes.
#pragma once

#include "codec.h"

namespace psyche {

// Bounded: it reads and writes nowhere but between its pointers, whatever the stream says.

template <int CONTEXTS>
struct Model {
  static constexpr int BITS = 12, ADAPTATION = 5;
  u16 zero[CONTEXTS];

  Model() {
    for (u16& probability : zero) probability = 1 << (BITS - 1);
  }
  void saw(u32 context, u32 bit) {
    u16& probability = zero[context];
    probability = (u16)(bit ? probability - (probability >> ADAPTATION)
                            : probability + (((1 << BITS) - probability) >> ADAPTATION));
  }
  u32 bound(u32 range, u32 context) const { return (range >> BITS) * zero[context]; }
};

constexpr u32 RANGE_TOP = 1u << 24;

class RangeEncoder {
 public:
  RangeEncoder(u8* out, u8* end) : out_(out), end_(end) {}

  template <int CONTEXTS>
  void bit(Model<CONTEXTS>& model, u32 context, u32 bit) {
    const u32 bound = model.bound(range_, context);
    if (bit) {
      low_ += bound;
      range_ -= bound;
    } else {
      range_ = bound;
    }
    model.saw(context, bit);
    normalise();
  }
  template <int CONTEXTS>
  void tree(Model<CONTEXTS>& model, u32 offset, u32 value, int bits) {
    u32 node = 1;
    for (int at = bits - 1; at >= 0; --at) {
      const u32 next = value >> at & 1u;
      bit(model, offset + node, next);
      node = 2 * node + next;
    }
  }
  void raw(u32 value, int bits) {
    range_ >>= bits;
    low_ += (u64)value * range_;
    normalise();
  }
  // Where the stream ends, or null where it did not fit.
  u8* finish() {
    for (int i = 0; i < 5; ++i) shift();
    return fits_ ? out_ : nullptr;
  }
  bool fits() const { return fits_; }

 private:
  void normalise() {
    while (range_ < RANGE_TOP) {
      range_ <<= 8;
      shift();
    }
  }
  void shift() {
    if (low_ < 0xFF000000u || low_ > 0xFFFFFFFFu) {
      const u8 carry = (u8)(low_ >> 32);
      put((u8)(cache_ + carry));
      for (; pending_ > 1; --pending_) put((u8)(0xFFu + carry));
      pending_ = 0;
      cache_ = (u8)(low_ >> 24);
    }
    ++pending_;
    low_ = (low_ << 8) & 0xFFFFFFFFu;
  }
  void put(u8 byte) {
    fits_ = fits_ && out_ < end_;
    if (fits_) *out_++ = byte;
  }

  u8* out_;
  u8* end_;
  bool fits_ = true;
  u64 low_ = 0;
  u32 range_ = 0xFFFFFFFFu;
  u8 cache_ = 0;
  u64 pending_ = 1;
};

// Once it is corrupt it stays so, and what it then says means nothing.
class RangeDecoder {
 public:
  RangeDecoder(const u8* data, const u8* end) : at_(data), end_(end) {
    pull();
    corrupt_ = corrupt_ || code_ != 0;
    for (int i = 0; i < 4; ++i) pull();
    corrupt_ = corrupt_ || code_ == 0xFFFFFFFFu;
  }

  template <int CONTEXTS>
  u32 bit(Model<CONTEXTS>& model, u32 context) {
    const u32 bound = model.bound(range_, context);
    const u32 bit = code_ >= bound;
    if (bit) {
      code_ -= bound;
      range_ -= bound;
    } else {
      range_ = bound;
    }
    model.saw(context, bit);
    normalise();
    return bit;
  }
  template <int CONTEXTS>
  u32 tree(Model<CONTEXTS>& model, u32 offset, int bits) {
    u32 node = 1;
    for (int i = 0; i < bits; ++i) node = 2 * node + bit(model, offset + node);
    return node - (1u << bits);
  }
  u32 raw(int bits) {
    range_ >>= bits;
    u32 value = code_ / range_;
    if (value >> bits) {
      corrupt_ = true;
      value = 0;
    }
    code_ -= value * range_;
    normalise();
    return value;
  }
  bool corrupt() const { return corrupt_; }
  // Whether the last symbol was read with the last byte.
  bool finished() const { return !corrupt_ && at_ == end_; }

 private:
  void normalise() {
    while (range_ < RANGE_TOP) {
      range_ <<= 8;
      pull();
    }
  }
  void pull() {
    if (at_ == end_) {
      corrupt_ = true;
      code_ <<= 8;
      return;
    }
    code_ = code_ << 8 | *at_++;
  }

  const u8* at_;
  const u8* end_;
  u32 range_ = 0xFFFFFFFFu;
  u32 code_ = 0;
  bool corrupt_ = false;
};

}  // namespace psyche
