"""The signed envelope: every claim a node makes travels in one.

An envelope says who claims what, in which run, in which round, and for which purpose (``domain``); all of that is
under the signature, so a message replayed in another run, another round or another role fails (DESIGN §8). This
module only gives bytes their form; keys are ``psyche.network.identity``'s business.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

MAX_ENVELOPE = 1 << 20
"""Bytes of the largest envelope anyone has to read. Bigger things are blobs, named here by their root."""

_SIGNED = b"psyche 1 envelope\n"
"""What is signed starts with this, so that a signature made for anything else is never a valid envelope."""


class MalformedMessage(ValueError):
    """Bytes from a peer are not the message they should be; the text is a short reason."""


class Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One signed message. ``body`` is opaque here; ``author`` is a base58 PeerID, which contains the public key."""

    domain: Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9][a-z0-9/._-]{0,31}\Z")]
    run_id: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    round: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    author: Annotated[str, msgspec.Meta(pattern=r"\A12D3Koo[1-9A-HJ-NP-Za-km-z]{45}\Z")]
    body: bytes
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)


def signing_bytes(envelope: Envelope) -> bytes:
    """What the author signs: a tag and canonical msgpack of everything but the signature."""
    e = envelope
    return _SIGNED + _encoder.encode((e.domain, e.run_id, e.round, e.author, e.body))


def encode(envelope: Envelope) -> bytes:
    """Canonical msgpack. Equal envelopes give equal bytes."""
    return _encoder.encode(envelope)


def decode(data: bytes, max_bytes: int = MAX_ENVELOPE) -> Envelope:
    """Inverse of :func:`encode`; the signature is *not* checked here.

    Raises :class:`MalformedMessage`, and nothing else, on anything that is too long, not an envelope, or not in
    the one canonical form (two byte strings must never be the same message).
    """
    if len(data) > max_bytes:
        raise MalformedMessage(f"{len(data)} bytes, over the limit of {max_bytes}")
    try:
        envelope = _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MalformedMessage(f"not an envelope: {str(error)[:120]}") from None
    if _encoder.encode(envelope) != data:
        raise MalformedMessage("not in canonical form")
    return envelope
