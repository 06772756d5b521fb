// Sums of points of the curve of Ed25519 (RFC 8032), for checking many signatures at once: psyche/network/signatures.py.
#pragma once

#include "codec.h"

namespace psyche {

// Whether 8 * sum(scalar * point) is the identity. `points` are `count` encoded points of 32 bytes, `scalars` as many
// numbers below 2^256, little-endian. False, too, where a point is no point in its one encoding.
// Everything in here is public: time depends on the values.
bool vanishes(const u8* points, const u8* scalars, i64 count);

}  // namespace psyche
