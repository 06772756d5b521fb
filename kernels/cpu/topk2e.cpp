#include "kept.h"
#include "operations.h"
#include "rangecoder.h"

namespace psyche {
namespace {

constexpr int CLASSES = 13;
constexpr int MODELLED = 2;

struct Models {
  Model<16> gap_class;
  Model<(CLASSES << MODELLED)> gap_top;
  Model<1> high;
  struct {
    Model<256> exponent;
    Model<128> fraction;
  } low_level, high_level;
};

int modelled_bits(int size) { return size < MODELLED ? size : MODELLED; }

template <class LevelModels>
void write_level(RangeEncoder& coder, LevelModels& models, u32 level) {
  coder.tree(models.exponent, 0, level >> 7, 8);
  coder.tree(models.fraction, 0, level & 127u, 7);
}

template <class LevelModels>
u32 read_level(RangeDecoder& coder, LevelModels& models) {
  const u32 exponent = coder.tree(models.exponent, 0, 8);
  return exponent << 7 | coder.tree(models.fraction, 0, 7);
}

void write_chunk(RangeEncoder& coder, Models& models, const Kept& kept, int n) {
  write_level(coder, models.low_level, kept.low);
  write_level(coder, models.high_level, kept.high);
  int previous = -1;
  for (int i = 0; i < n; ++i) {
    const u32 gap = (u32)(kept.index[i] - previous);  // from 1; one more than the reference's
    const int size = 31 - __builtin_clz(gap), modelled = modelled_bits(size), rest = size - modelled;
    const u32 below = gap - (1u << size);
    coder.tree(models.gap_class, 0, (u32)size, 4);
    coder.tree(models.gap_top, (u32)size << MODELLED, below >> rest, modelled);
    coder.bit(models.high, 0, kept.is_high[i]);
    coder.raw((below & ((1u << rest) - 1u)) << 1 | kept.is_negative[i], rest + 1);
    previous = kept.index[i];
  }
}

bool read_chunk(RangeDecoder& coder, Models& models, Kept& kept, int n) {
  kept.low = read_level(coder, models.low_level);
  kept.high = read_level(coder, models.high_level);
  i32 index = -1;
  for (int i = 0; i < n; ++i) {
    const int size = (int)coder.tree(models.gap_class, 0, 4);
    if (size >= CLASSES) return false;
    const int modelled = modelled_bits(size), rest = size - modelled;
    const u32 below = coder.tree(models.gap_top, (u32)size << MODELLED, modelled) << rest;
    kept.is_high[i] = (u8)coder.bit(models.high, 0);
    const u32 raw = coder.raw(rest + 1);
    index += (i32)(1u << size | below | raw >> 1);
    if (index >= CHUNK) return false;
    kept.index[i] = (u16)index;
    kept.is_negative[i] = raw & 1u;
  }
  return !coder.corrupt();
}

}  // namespace

i64 compress(int kept, const u8* body, i64 chunks, u8* out, i64 capacity) {
  const TopK2Layout layout = TopK2Layout::of(kept);
  RangeEncoder coder(out, out + capacity);
  Models models;
  Kept chunk;
  for (i64 i = 0; i < chunks && coder.fits(); ++i) {
    if (!read_kept(layout, body + i * layout.bytes, chunk)) return -1;
    write_chunk(coder, models, chunk, kept);
  }
  const u8* end = coder.finish();
  return end ? end - out : -1;
}

bool expand(int kept, const u8* data, i64 size, i64 chunks, u8* body) {
  const TopK2Layout layout = TopK2Layout::of(kept);
  RangeDecoder coder(data, data + size);
  Models models;
  Kept chunk;
  for (i64 i = 0; i < chunks; ++i) {
    if (coder.corrupt() || !read_chunk(coder, models, chunk, kept)) return false;
    write_kept(layout, chunk, body + i * layout.bytes);
  }
  return coder.finished();
}

}  // namespace psyche
