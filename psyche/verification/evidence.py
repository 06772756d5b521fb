"""What an auditor keeps of work that it did not pass, so that anybody can do it again from files and the ledger alone.

``<directory>/<accused>/<round>/`` holds what the audit was handed: the kit, and its blobs by their roots, as ``kit.py``
has them. With them lies what proves θ, which no record names: the chunk hashes of the outer state before the round,
whose root is in the round's plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from msgspec import Meta
from typing_extensions import Buffer

from psyche.numerics.digest import CHUNK, BlobIndex
from psyche.protocol.envelope import MalformedMessage
from psyche.protocol.wire import Body, decode
from psyche.verification.kit import Kit, Kits, Unserved

EVIDENCE = "evidence"
"""Its place in a node's directory."""
ROUNDS = 4
"""Of each accused, the newest ones, that are kept: each is about 20 bytes a parameter."""
BASE = "base"


class Base(Body, frozen=True):
    """The outer state that a round begins from, without its content: enough to tell θ from anything else."""

    DOMAIN = "base"

    index: bytes
    """Encoded :class:`BlobIndex` of θ and m, one after the other."""
    seam: Annotated[bytes, Meta(max_length=CHUNK)]
    """The chunk in which θ ends."""

    @classmethod
    def of(cls, index: BlobIndex, state: Buffer) -> Base:
        """Of the bytes of a state, and its index."""
        view = memoryview(state).cast("B")
        start = view.nbytes // 2 // CHUNK * CHUNK
        return cls(index.encode(), bytes(view[start : start + CHUNK]))

    def theta_root(self, state_root: bytes) -> bytes:
        """Root of θ as a blob of its own, in the state of root ``state_root``. Raises :class:`Unserved` where this is
        no proof of that."""
        try:
            index = BlobIndex.decode(self.index)
        except ValueError as error:
            raise Unserved(str(error)) from None
        whole, rest = divmod(index.size // 2, CHUNK)
        if index.root != state_root or not index.matches(whole, self.seam):
            raise Unserved("the chunk hashes are not those of the state that the round began from")
        return index.head(whole, self.seam[:rest]).root


class Evidence:
    """All that one node has, of all it did not pass."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(self, accused: str, round: int, kit: Kit, blobs: Mapping[bytes, Buffer], base: Base) -> None:
        """Write a case, and forget the oldest of this accused. Raises ``OSError``."""
        kits = self._kits(accused)
        kits.begin(round)
        for blob in blobs.values():
            kits.keep(round, blob)
        kits.finish(round, kit)
        if round in kits.rounds:
            (kits.place(round) / BASE).write_bytes(base.encode())
        for old in kits.rounds[:-ROUNDS]:
            kits.forget_one(old)

    def cases(self) -> list[tuple[str, int]]:
        """Accused and round of all that is here, ascending."""
        if not self._directory.is_dir():
            return []
        nodes = sorted(path.name for path in self._directory.iterdir() if path.is_dir())
        return [(node, round) for node in nodes for round in self._kits(node).rounds]

    def kit(self, accused: str, round: int) -> Kit:
        """Raises :class:`Unserved` where it is not here, or damaged."""
        found = self._kits(accused).kit(round)
        if found is None:
            raise Unserved("there is no evidence of it")
        return found

    def base(self, accused: str, round: int) -> Base:
        """Raises :class:`Unserved` where it is not here, or damaged."""
        try:
            return decode(Base, (self._kits(accused).place(round) / BASE).read_bytes())
        except (OSError, MalformedMessage) as error:
            raise Unserved(f"what proves θ is missing ({error})") from None

    def read(self, accused: str, round: int, root: bytes, limit: int) -> bytes:
        """A blob, of at most ``limit`` bytes. Raises :class:`Unserved`."""
        return self._kits(accused).read(round, root, limit)

    def _kits(self, accused: str) -> Kits:
        return Kits(self._directory / accused)
