"""What a process promised and signed, on disk before anybody hears of it: an acceptor's ballot, a coordinator's oath.

Small files, replaced in one step. One that cannot be read is no reason to begin anew: who forgets what it signed can
sign the contrary.
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
from psyche.protocol.signed_state import SignedState

HASH_BYTES = 32

T = TypeVar("T", "Ballot", SignedState)


@dataclass(frozen=True)
class Ballot:
    """How a member voted last, with what a new leader needs to have it voted on again."""

    acceptor: Acceptor = field(default_factory=Acceptor)
    claim: bytes | None = None
    """Signed by the leader that the acceptor follows."""
    round: int = 0
    """It voted in."""
    proposal: bytes | None = None
    """Signed. The commitments and contributions it is about are, too."""
    commitments: tuple[bytes, ...] = ()
    contributions: tuple[bytes, ...] = ()


def keep(path: Path, run_id: bytes, pledge: Ballot | SignedState) -> None:
    """Write ``pledge`` durably. Raises :class:`PsycheError` where the disk is full: then nothing may be said."""
    content = msgspec.msgpack.encode(pledge)
    with disk_errors(path, "--directory"):
        write_durably(path, digest("pledge", run_id, content) + content)


def recall(path: Path, run_id: bytes, fresh: T) -> T:
    """What was kept at ``path``, or ``fresh`` where nothing ever was. Raises :class:`PsycheError`."""
    if not path.exists():
        return fresh
    data = path.read_bytes()
    content = data[HASH_BYTES:]
    try:
        if data[:HASH_BYTES] != digest("pledge", run_id, content):
            raise ValueError("its content does not have the hash in its head, or belongs to another run")
        return msgspec.msgpack.decode(content, type=type(fresh))
    except (ValueError, msgspec.MsgspecError) as error:
        raise PsycheError(
            f"{path} cannot be read ({error}): it holds what this node signed, which it must not contradict; "
            "join with another identity (--directory) instead"
        ) from None
