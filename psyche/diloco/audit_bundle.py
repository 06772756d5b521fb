"""What a node keeps on disk of its last rounds, so that others can do them again: parameters and optimizer at the trace
points, θ, and the error feedback before it was encoded. All of it are blobs by their roots.

``<directory>/<round>/<root in hex>``, and ``<directory>/<round>/bundle`` once the round is whole. Nothing is flushed:
who fetches a blob checks it, and one that a power loss cut short is no blob any more.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Annotated

from msgspec import Meta
from typing_extensions import Buffer

from psyche.config.trust import MAX_POINTS
from psyche.diloco.trace import Point, trace_root
from psyche.numerics.digest import CHUNK, BlobIndex, index_blob
from psyche.protocol.envelope import MalformedMessage
from psyche.protocol.wire import Body, decode

MAX_KIT = MAX_POINTS * 80 + 16
"""Bytes of an encoded kit, at most."""
NAME = "kit"


class AuditBundle(Body, frozen=True):
    """The trace points of a round. Whether they are those committed to, their root says."""

    DOMAIN = "kit"

    points: Annotated[tuple[Point, ...], Meta(min_length=1, max_length=MAX_POINTS)]

    @property
    def trace_root(self) -> bytes:
        return trace_root(self.points)


class Unserved(Exception):
    """A blob that a node committed to is not to be had of it."""


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


class AuditBundles:
    """A node's, one directory a round. A disk that cannot be written costs the node the proof, not the round.

    Who trains waits for hashes and not for the disk: a thread writes, one blob at a time, so that no more than one is
    held in memory for it.
    """

    def __init__(self, directory: Path, warn: Callable[[str], None] = lambda text: None) -> None:
        """What an earlier process of the node left there whole is still there."""
        self._directory, self._warn = directory, warn
        self._broken: set[int] = set()
        self._writer = ThreadPoolExecutor(1, "kits")
        self._writing: Future[None] | None = None
        for round_number, place in self._places():
            if not (place / NAME).is_file():
                self.forget_one(round_number)

    @property
    def rounds(self) -> list[int]:
        """Those that can be done again, ascending."""
        self._settle()
        return sorted(round_number for round_number, place in self._places() if (place / NAME).is_file())

    def begin(self, round_number: int) -> None:
        """``round`` is trained for, maybe once more."""
        self._settle()
        self._broken.discard(round_number)
        self.forget_one(round_number)

    def keep(self, round_number: int, blob: Buffer) -> bytes:
        """Hash a blob of ``round``, and have it written: it must stay as it is until the next one is kept. Its root.

        Raises nothing: where it cannot be written the round will not be served.
        """
        root = index_blob(blob).root
        self._begin(round_number, lambda: self._write(round_number, root, blob))
        return root

    def finish(self, round_number: int, bundle: AuditBundle) -> None:
        """All blobs of ``round`` were given."""
        self._begin(round_number, lambda: self._write_kit(round_number, bundle))

    def bundle(self, round_number: int) -> AuditBundle | None:
        """That of ``round``, if it is here."""
        self._settle()
        try:
            return decode(AuditBundle, (self._place(round_number) / NAME).read_bytes())
        except (OSError, MalformedMessage):
            return None

    def blobs(self, round_number: int) -> Iterator[tuple[bytes, Callable[[], BlobIndex], Callable[[int], bytes]]]:
        """Root, index and chunks of each blob of ``round``, as ``BlobServer.add_unread`` takes them."""
        self._settle()
        for path in self._place(round_number).glob("?" * 64):
            root = bytes.fromhex(path.name)
            yield root, partial(_index_of, path, root), partial(_chunk_of, path)

    def read(self, round_number: int, root: bytes, limit: int) -> bytes:
        """A blob of ``round``, of at most ``limit`` bytes, as it would come from another node. Raises
        :class:`Unserved`."""
        self._settle()
        return read_blob(self._place(round_number), root, limit)

    def forget(self, before: int, keep: Collection[int] = ()) -> None:
        """Delete rounds below ``before`` but those of ``keep``."""
        for round_number, _ in self._places():
            if round_number < before and round_number not in keep:
                self.forget_one(round_number)

    def forget_one(self, round_number: int) -> None:
        """Delete ``round``, if it is there."""
        shutil.rmtree(self._place(round_number), ignore_errors=True)

    # ------------------------------------------------------------------------------------ on disk

    def _begin(self, round_number: int, write: Callable[[], None]) -> None:
        def run() -> None:
            if round_number in self._broken:
                return
            try:
                write()
            except OSError as error:
                self._fail(round_number, error)

        self._settle()
        self._writing = self._writer.submit(run)

    def _settle(self) -> None:
        """Wait for what is being written."""
        if self._writing is not None:
            self._writing.result()

    def _place(self, round_number: int) -> Path:
        return self._directory / f"{round_number:08d}"

    def _places(self) -> list[tuple[int, Path]]:
        if not self._directory.is_dir():
            return []
        return [(int(path.name), path) for path in self._directory.iterdir() if path.name.isdecimal()]

    def _write_kit(self, round_number: int, bundle: AuditBundle) -> None:
        place = self._place(round_number)
        place.mkdir(parents=True, exist_ok=True)
        (place / NAME).write_bytes(bundle.encode())

    def _write(self, round_number: int, root: bytes, blob: Buffer) -> None:
        place = self._place(round_number)
        place.mkdir(parents=True, exist_ok=True)
        path = place / root.hex()
        if path.exists():
            return
        view = memoryview(blob).cast("B")
        with contextlib.suppress(OSError):  # the optimizer a round ends with is the one that the next begins with
            earlier = self._place(round_number - 1) / root.hex()
            if earlier.stat().st_size == view.nbytes:
                os.link(earlier, path)
                return
        with path.open("wb", buffering=0) as file:
            while view:
                view = view[file.write(view) :]

    def _fail(self, round_number: int, error: OSError) -> None:
        self._broken.add(round_number)
        self.forget_one(round_number)
        self._warn(
            f"what others need to check round {round_number} cannot be written to {self._directory} "
            f"({error.strerror}): free some disk, or an audit of it will find nothing"
        )


def read_blob(directory: Path, root: bytes, limit: int) -> bytes:
    """The blob of a root, of at most ``limit`` bytes, from where it lies by that name. Raises :class:`Unserved` where
    it is not there, or is another."""
    path = directory / root.hex()
    try:
        content = path.read_bytes() if path.stat().st_size <= limit else b""
    except OSError:
        content = b""
    if not content or index_blob(content).root != root:
        raise Unserved(f"{root.hex()[:8]} of {directory.name}")
    return content


def _index_of(path: Path, root: bytes) -> BlobIndex:
    """Raises ``LookupError`` where the file is not what it was."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        index = index_blob(content)
    if index.root != root:
        raise LookupError("the file is another, or corrupt")
    return index


def _chunk_of(path: Path, number: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), CHUNK, number * CHUNK)
