"""The invite: one string with all that a newcomer needs, the run id and addresses of nodes in the run.

``psyche1`` + urlsafe base64 of (canonical msgpack ‖ 4 bytes of checksum). The run id is the manifest's hash, so
no node at those addresses can substitute another run.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from psyche.config import MANIFEST, Manifest
from psyche.errors import PsycheError
from psyche.network.address import MAX_ADDRESSES, is_loopback, split_address
from psyche.network.identity import IDENTITY, in_use
from psyche.network.peer_book import PEERS, PeerBook, interleaved
from psyche.numerics.digest import digest

_PREFIX = "psyche1"
_MAX_TEXT = 8192
_CHECKSUM = 4


class InviteError(PsycheError):
    """A string is not an invite that this version can read; the message says why and what to do."""


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
                raise InviteError(f"the invite's address {address[:80]!r} is invalid: {error}") from None

    def encode(self) -> str:
        """Return the invite as a string to share."""
        payload = msgspec.msgpack.encode((self.run_id, self.addresses))
        return _PREFIX + base64.urlsafe_b64encode(payload + _checksum(payload)).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Inverse of :meth:`encode`; surrounding white space is ignored. Raises :class:`InviteError`."""
        text = text.strip()
        version = re.match(r"psyche(\d+)", text[:32])
        if not text.startswith(_PREFIX):
            if version:
                raise InviteError(
                    f"this invite has version {version[1]}, this psyche reads version 1: install the run's version"
                )
            raise InviteError(f"this is not an invite (an invite starts with {_PREFIX}): copy the whole string")
        invite = cls(*_payload(text))
        if invite.encode() != text:
            raise InviteError("the invite is not in canonical form: ask for a new one")
        return invite


def invite_from(directory: Path) -> Invite:
    """Return an invite with the addresses of the node in ``directory``, if it is running, and of the peers it met last.

    Raises :class:`PsycheError` where there is no node, or it has met no peer.
    """
    try:
        manifest = Manifest.decode((directory / MANIFEST).read_bytes())
    except OSError as error:
        raise PsycheError(
            f"there is no run in {directory} ({error.strerror}): pass the --directory of a node or coordinator"
        ) from None
    book = PeerBook(directory / PEERS)
    own = book.own if in_use(directory / IDENTITY) else ()
    addresses = interleaved([own, *book.by_peer()])
    if not addresses:
        raise PsycheError(
            f"the node in {directory} is not running and knows no peers: start it, or share the invite it joined with"
        )
    return Invite(manifest.run_id, tuple(sorted(addresses[: 2 * MAX_ADDRESSES], key=is_loopback)[:MAX_ADDRESSES]))


def only_run_directory(runs: Path) -> Path:
    """Return the directory of the only run joined from this machine. Raises :class:`PsycheError` for none or
    several."""
    found = sorted(path.parent for path in runs.glob(f"*/{MANIFEST}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise PsycheError(
            f"this machine has joined several runs; pass one as --directory: {', '.join(map(str, found[:8]))}"
        )
    raise PsycheError(f"no run was joined from this machine ({runs}): pass the --directory of a node or coordinator")


def _payload(text: str) -> tuple[bytes, tuple[str, ...]]:
    damaged = InviteError("the invite is cut off or mistyped (wrong checksum): copy the whole string again")
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
        raise InviteError("the invite does not contain a run id and addresses: ask for a new one") from None


def _checksum(payload: bytes) -> bytes:
    return digest("invite", payload)[:_CHECKSUM]
