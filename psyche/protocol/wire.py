"""What messages are made of: bounded types, and one canonical form (msgpack) for each value."""

from __future__ import annotations

from typing import Annotated, ClassVar, TypeVar

import msgspec
from msgspec import Meta

from psyche.protocol.envelope import MalformedMessage

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
