"""The wire format: bounded types in canonical msgpack, signed envelopes, refusal codes.

An envelope says who claims what, in which run, in which round, and for which purpose (``domain``). All of that is under
the signature, so that a message replayed in another run, another round or for another purpose is invalid. This module
only gives bytes their form; signatures are made and checked in ``psyche.network.identity``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar, TypeVar

import msgspec
from msgspec import Meta

MAX_MEMBERS = 4096
MAX_COORDINATORS = 16

NodeId = Annotated[str, Meta(pattern=r"\A12D3Koo[1-9A-HJ-NP-Za-km-z]{45}\Z")]
"""A base58 PeerID of an Ed25519 key. Ascending order of these strings is the order of summation."""
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Natural = Annotated[int, Meta(ge=0, le=2**62)]
Positive = Annotated[int, Meta(ge=1, le=2**62)]
Reason = Annotated[str, Meta(max_length=200)]
Nodes = Annotated[tuple[NodeId, ...], Meta(max_length=MAX_MEMBERS)]
Signed = Annotated[bytes, Meta(max_length=1 << 20)]
"""An encoded envelope inside another message."""


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages and of what they contain."""


class Body(Message, frozen=True):
    """A message that is sent on its own, under its own domain."""

    DOMAIN: ClassVar[str]

    def encode(self) -> bytes:
        """Canonical msgpack: fields in order of definition, no names, one form for each value."""
        return msgspec.msgpack.encode(self)


B = TypeVar("B", bound=Body)


def decode(kind: type[B], data: bytes) -> B:
    """Inverse of ``encode``. Raises :class:`MalformedMessage`, and nothing else, on any other bytes."""
    try:
        body = msgspec.msgpack.decode(data, type=kind)
        canonical = body.encode() == data
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as error:
        raise MalformedMessage(f"not a {kind.DOMAIN} message: {str(error)[:120]}") from None
    if not canonical:
        raise MalformedMessage(f"not a {kind.DOMAIN} message in canonical form")
    return body


MAX_ENVELOPE = 1 << 20
"""Bytes of the largest envelope anyone has to read. Bigger things are blobs, named here by their root."""

_SIGNED = b"psyche 1 envelope\n"
"""Prefix of signed bytes, so that a signature made for anything else is never a valid envelope."""


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
    """Return what the author signs: a tag and canonical msgpack of everything but the signature."""
    e = envelope
    return _SIGNED + _encoder.encode((e.domain, e.run_id, e.round, e.author, e.body))


def encode_envelope(envelope: Envelope) -> bytes:
    """Canonical msgpack. Equal envelopes give equal bytes."""
    return _encoder.encode(envelope)


def decode_envelope(data: bytes, max_bytes: int = MAX_ENVELOPE) -> Envelope:
    """Inverse of :func:`encode_envelope`; the signature is *not* checked here.

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


WATCH_SECONDS = 4.0
"""How long a coordinator holds a ``watch`` call open while nothing changes; well under any ``silence`` bound."""
MAX_SUBMISSION = 1 << 20
"""Bytes of the largest ``submit`` request."""
MAX_STATUS = 8 << 20
"""Bytes of the largest :class:`~psyche.protocol.messages.RunStatus`."""


class RefusalCode(StrEnum):
    """Why a coordinator refuses a call. Programs compare the code; the sentence beside it is for people."""

    NOT_LEADING = "not-leading"
    """Another coordinator leads, or none does yet."""
    UNKNOWN_PEER = "unknown-peer"
    """The coordinator does not know the caller, or has forgotten it after a restart or a silence: send ``Hello``."""
    MALFORMED = "malformed"
    """The message does not decode, its signature is wrong, or what it proves is not proven."""
    BANNED = "banned"
    """The sender was convicted of cheating in this run."""
    NOT_A_MEMBER = "not-a-member"
    """The sender is neither in the plan nor in the electorate that the message is about."""
    WRONG_ROUND = "wrong-round"
    """The message is about a round that is not open."""
    WRONG_TERM = "wrong-term"
    """The message is about a term that is over or has not begun."""
    TOO_EARLY = "too-early"
    """The round has not reached the stage that the message belongs to."""
    TOO_LATE = "too-late"
    """The deadline of the stage that the message belongs to has passed."""
    CONFLICT = "conflict"
    """The sender said something else before."""
    INVALID = "invalid"
    """The content breaks a rule of the run."""
    NO_OPEN_AUDIT = "no-open-audit"
    """The statement is about an audit that is not open to its sender."""
    BEHIND = "behind"
    """The sender has applied rounds that the coordinator does not know of yet."""

    @property
    def is_routine(self) -> bool:
        """Whether honest nodes cause this in ordinary operation, by two messages that cross on their way."""
        return self in (RefusalCode.NO_OPEN_AUDIT, RefusalCode.WRONG_TERM, RefusalCode.NOT_LEADING)
