"""Many signatures checked at once, in a tenth of the time that each on its own takes.

A signature (R, s) of a message m under the key A is valid where s·B = R + h·A, with h = SHA-512(R, A, m) (RFC 8032).
So for any numbers z the sum of z·(R + h·A − s·B) over many signatures is nothing; and if one of them is invalid, and
the z are drawn at random after the signatures are known, it is nothing with a chance of 2⁻¹²⁸ (Bellare, Garay, Rabin:
Fast Batch Verification, 1998). A sum of many multiples takes a fraction of the time of each, and what one key signed
many times is in it once (``kernels/cpu/ed25519.cpp``).

Both sides are multiplied by 8, as RFC 8032 allows. So who owns a key can make signatures that hold here and not where
the equation is checked without (as OpenSSL does); nobody else can, and none that it would not vouch for.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter

from psyche.network.identity import BadSignature, check_context, public_key
from psyche.protocol.wire import Envelope, signing_bytes

try:
    from psyche._native import vanishes
except ImportError:  # it was not compiled, or is older
    vanishes = None  # type: ignore[assignment]

ORDER = 2**252 + 27742317777372353535851937790883648493
"""Of B."""
_BASE = bytes([0x58]) + bytes([0x66]) * 31
"""B, encoded."""


def available() -> bool:
    """Whether this build can check signatures together."""
    return vanishes is not None


class Batch:
    """Signatures that are believed until :meth:`holds` is asked."""

    def __init__(self) -> None:
        self._signed: list[tuple[bytes, bytes, bytes]] = []
        """Key, signature, message."""

    def open_envelope(self, envelope: Envelope, *, domain: str, run_id: bytes, round_number: int | None = None) -> None:
        """As :func:`~psyche.network.identity.open_envelope`, but for the signature itself, which is kept."""
        check_context(envelope, domain=domain, run_id=run_id, round_number=round_number)
        key = public_key(envelope.author)
        if key is None:
            raise BadSignature(f"not signed by {envelope.author}")
        self._signed.append((key, envelope.signature, signing_bytes(envelope)))

    def holds(self) -> bool:
        """Whether all of them are valid. If not, one of them is not; which, only checking each on its own says."""
        assert vanishes is not None, "asked where it is not available"
        points, scalars = [], []
        of_keys: Counter[bytes] = Counter()
        of_base = 0
        random = secrets.token_bytes(16 * len(self._signed))
        for number, (key, signature, message) in enumerate(self._signed):
            r, s = signature[:32], int.from_bytes(signature[32:], "little")
            if s >= ORDER:  # the same signature in another form
                return False
            h = int.from_bytes(hashlib.sha512(r + key + message).digest(), "little")
            z = random[16 * number : 16 * number + 16]
            factor = int.from_bytes(z, "little")
            points.append(r)
            scalars.append(z + bytes(16))
            of_keys[key] += factor * h
            of_base -= factor * s
        for point, factor in (*of_keys.items(), (_BASE, of_base)):
            points.append(point)
            scalars.append((factor % ORDER).to_bytes(32, "little"))
        return vanishes(b"".join(points), b"".join(scalars))
