"""What a process has signed, on disk before the signature is sent: a voter's ballot, a coordinator's signed state.

The files are small and replaced atomically. An unreadable file is an error, never a fresh start: a process that forgets
what it signed may sign a contradiction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from psyche.durable import disk_errors, write_durably
from psyche.errors import PsycheError
from psyche.numerics.digest import digest
from psyche.protocol.acceptor import Acceptor
from psyche.protocol.certificates import SignedState

HASH_BYTES = 32

T = TypeVar("T", "Ballot", SignedState)


@dataclass(frozen=True)
class Ballot:
    """A member's last vote, with what a new leader needs to put the same proposal to the vote again."""

    acceptor: Acceptor = field(default_factory=Acceptor)
    claim: bytes | None = None
    """The leadership claim that the acceptor follows, signed by the leader."""
    round: int = 0
    """The round of the vote."""
    proposal: bytes | None = None
    """The signed proposal that was voted for."""
    commitments: tuple[bytes, ...] = ()
    """Signed commitments that the proposal refers to."""
    contributions: tuple[bytes, ...] = ()
    """Signed contributions that the proposal refers to."""


def save_signed(path: Path, run_id: bytes, signed: Ballot | SignedState) -> None:
    """Write ``signed`` durably. Raises :class:`PsycheError` (disk full): then the signature must not be sent."""
    content = msgspec.msgpack.encode(signed)
    with disk_errors(path, "--directory"):
        write_durably(path, digest("pledge", run_id, content) + content)


def load_signed(path: Path, run_id: bytes, fresh: T) -> T:
    """Read what was saved at ``path``, or return ``fresh`` if there is no file. Raises :class:`PsycheError`."""
    if not path.exists():
        return fresh
    data = path.read_bytes()
    content = data[HASH_BYTES:]
    try:
        if data[:HASH_BYTES] != digest("pledge", run_id, content):
            raise ValueError("its hash does not match its content, or it belongs to another run")
        return msgspec.msgpack.decode(content, type=type(fresh))
    except (ValueError, msgspec.MsgspecError) as error:
        raise PsycheError(
            f"{path} cannot be read ({error}). It records what this node has signed and must not contradict: "
            "a node can join with a new identity (another --directory); a coordinator cannot, because the run names "
            "its key: leave it off, and let the others continue"
        ) from None
