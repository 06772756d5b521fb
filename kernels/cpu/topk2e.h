// The entropy coding of topk2e: psyche/numerics/codecs/topk2e.py defines it.
#pragma once

#include "codec.h"

namespace psyche {

// Codes a sound topk2 body of `chunks` chunks to at most `capacity` bytes. Their number, or -1 where they do not suffice.
i64 compress(int kept, const u8* body, i64 chunks, u8* out, i64 capacity);

// Decodes a stream to a topk2 body of `chunks` chunks. False where no encoder writes such a stream; the body is then
// undefined. Levels are not checked.
bool expand(int kept, const u8* data, i64 size, i64 chunks, u8* body);

}  // namespace psyche
