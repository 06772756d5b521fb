"""The invite: one string with all that a newcomer needs, the run's id and where to find it.

``psyche1`` + urlsafe base64 of (canonical msgpack ‖ 4 bytes of checksum). The run id is the manifest's hash, so
whoever answers at those addresses cannot pass off another run.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Self

import msgspec

from psyche.errors import PsycheError
from psyche.network.address import split_address
from psyche.numerics.digest import digest

MAX_ADDRESSES = 16
_PREFIX = "psyche1"
_MAX_TEXT = 8192
_CHECKSUM = 4


class InviteError(PsycheError):
    """A string is not an invite that this version can use; the message says why and what to do."""


@dataclass(frozen=True)
class Invite:
    """``run_id`` (32 bytes) and 1 to 16 multiaddresses, each ending with ``/p2p/<PeerID>``."""

    run_id: bytes
    addresses: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.run_id) != 32:
            raise InviteError(f"a run id has 32 bytes, not {len(self.run_id)}")
        if not 1 <= len(self.addresses) <= MAX_ADDRESSES:
            raise InviteError(f"an invite holds 1 to {MAX_ADDRESSES} addresses, not {len(self.addresses)}")
        for address in self.addresses:
            try:
                split_address(address)
            except ValueError as error:
                raise InviteError(f"the invite's address {address[:80]!r} is of no use: {error}") from None

    def encode(self) -> str:
        """The string to hand out."""
        payload = msgspec.msgpack.encode((self.run_id, self.addresses))
        return _PREFIX + base64.urlsafe_b64encode(payload + _checksum(payload)).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Inverse of :meth:`encode`; surrounding white space is ignored. Raises :class:`InviteError`."""
        text = text.strip()
        version = re.match(r"psyche(\d+)", text[:32])
        if not text.startswith(_PREFIX):
            if version:
                raise InviteError(f"this invite is of version {version[1]}, this psyche reads version 1; update psyche")
            raise InviteError(f"this is not an invite: invites start with {_PREFIX}; copy the whole string")
        invite = cls(*_payload(text))
        if invite.encode() != text:
            raise InviteError("the invite is not in its one canonical form; ask for it to be made again")
        return invite


def _payload(text: str) -> tuple[bytes, tuple[str, ...]]:
    damaged = InviteError("the invite is cut off or mistyped (its checksum is wrong); copy the whole string again")
    encoded = text.removeprefix(_PREFIX)
    if len(text) > _MAX_TEXT or not re.fullmatch(r"[A-Za-z0-9_-]+", encoded):
        raise damaged
    try:
        data = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except (binascii.Error, ValueError):
        raise damaged from None
    payload, checksum = data[:-_CHECKSUM], data[-_CHECKSUM:]
    if checksum != _checksum(payload):
        raise damaged
    try:
        return msgspec.msgpack.decode(payload, type=tuple[bytes, tuple[str, ...]])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise InviteError("the invite does not hold a run id and addresses; ask for a new one") from None


def _checksum(payload: bytes) -> bytes:
    return digest("invite", payload)[:_CHECKSUM]
