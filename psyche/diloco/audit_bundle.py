"""Audit bundles: what a node keeps on disk of its last rounds so that others can replay them.

They hold parameters and optimizer state at the trace points, θ, and the error feedback before encoding, as blobs named
by their roots: ``<directory>/<round>/<root in hex>``, and ``<directory>/<round>/bundle`` once the round is complete.
Nothing is flushed to disk: a reader verifies every blob, so one that a power loss truncated counts as missing.
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

from psyche.config.run_config import MAX_POINTS
from psyche.diloco.trace import TracePoint, trace_root
from psyche.numerics.digest import CHUNK, BlobIndex, index_blob
from psyche.protocol.wire import Body, MalformedMessage, decode

MAX_BUNDLE_BYTES = MAX_POINTS * 80 + 16
"""Maximum size of an encoded :class:`AuditBundle`."""
BUNDLE = "bundle"
"""File name of the :class:`AuditBundle` in a round's directory."""


class BlobUnavailable(Exception):
    """A blob that a node committed to is missing, damaged or not served."""


class AuditBundle(Body, frozen=True):
    """The trace points of a round. They are genuine if their root is the one committed to."""

    DOMAIN = "audit-bundle"

    points: Annotated[tuple[TracePoint, ...], Meta(min_length=1, max_length=MAX_POINTS)]

    @property
    def trace_root(self) -> bytes:
        return trace_root(self.points)


class ThetaProof(Body, frozen=True):
    """Proves the root of θ within an outer state of which only the ``state_root`` is on record."""

    DOMAIN = "theta-proof"

    index: bytes
    """Encoded :class:`BlobIndex` of the outer state (θ followed by m)."""
    seam: Annotated[bytes, Meta(max_length=CHUNK)]
    """The chunk that contains the end of θ."""

    @classmethod
    def of(cls, index: BlobIndex, state: Buffer) -> ThetaProof:
        """Make the proof from the bytes of an outer state and its index."""
        view = memoryview(state).cast("B")
        start = view.nbytes // 2 // CHUNK * CHUNK
        return cls(index.encode(), bytes(view[start : start + CHUNK]))

    def theta_root(self, state_root: bytes) -> bytes:
        """Return the root of θ as a blob of its own. Raises :class:`BlobUnavailable` if the proof is invalid."""
        try:
            index = BlobIndex.decode(self.index)
        except ValueError as error:
            raise BlobUnavailable(str(error)) from None
        whole, rest = divmod(index.size // 2, CHUNK)
        if index.root != state_root or not index.matches(whole, self.seam):
            raise BlobUnavailable("the chunk hashes are not those of the round's base state")
        return index.head(whole, self.seam[:rest]).root


class AuditBundleStore:
    """A node's audit bundles, one directory a round. If the disk cannot be written, only the bundle is lost.

    Training waits for hashing, not for the disk: one thread writes one blob at a time, so that at most one is held in
    memory for it.
    """

    def __init__(self, directory: Path, warn: Callable[[str], None] = lambda text: None) -> None:
        """Keep complete rounds that an earlier process left in ``directory``, and delete incomplete ones."""
        self._directory, self._warn = directory, warn
        self._broken: set[int] = set()
        self._writer = ThreadPoolExecutor(1, "audit-bundles")
        self._writing: Future[None] | None = None
        for round_number, place in self._places():
            if not (place / BUNDLE).is_file():
                self.forget_one(round_number)

    @property
    def rounds(self) -> list[int]:
        """The rounds with a complete bundle, ascending."""
        self._wait()
        return sorted(round_number for round_number, place in self._places() if (place / BUNDLE).is_file())

    def begin(self, round_number: int) -> None:
        """Start the bundle of a round, replacing what an earlier attempt at it left."""
        self._wait()
        self._broken.discard(round_number)
        self.forget_one(round_number)

    def store(self, round_number: int, blob: Buffer) -> bytes:
        """Hash a blob, write it in the background, and return its root. It must not change until the next call.

        Raises nothing: if it cannot be written, the round is not served.
        """
        root = index_blob(blob).root
        self._begin(round_number, lambda: self._write(round_number, root, blob))
        return root

    def finish(self, round_number: int, bundle: AuditBundle) -> None:
        """Complete a round whose blobs have all been stored."""
        self._begin(round_number, lambda: self._write_bundle(round_number, bundle))

    def bundle(self, round_number: int) -> AuditBundle | None:
        """Return the bundle of a round, or None."""
        self._wait()
        try:
            return decode(AuditBundle, (self._place(round_number) / BUNDLE).read_bytes())
        except (OSError, MalformedMessage):
            return None

    def blobs(self, round_number: int) -> Iterator[tuple[bytes, Callable[[], BlobIndex], Callable[[int], bytes]]]:
        """Yield root, index loader and chunk reader of each blob of a round, for ``BlobServer.add_unread``."""
        self._wait()
        for path in self._place(round_number).glob("?" * 64):
            root = bytes.fromhex(path.name)
            yield root, partial(_index_of, path, root), partial(_chunk_of, path)

    def read(self, round_number: int, root: bytes, limit: int) -> bytes:
        """Return a verified blob of at most ``limit`` bytes. Raises :class:`BlobUnavailable`."""
        self._wait()
        return read_blob(self._place(round_number), root, limit)

    def forget(self, before: int, keep: Collection[int] = ()) -> None:
        """Delete rounds below ``before``, except those in ``keep``."""
        for round_number, _ in self._places():
            if round_number < before and round_number not in keep:
                self.forget_one(round_number)

    def forget_one(self, round_number: int) -> None:
        """Delete a round, if it is there."""
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

        self._wait()
        self._writing = self._writer.submit(run)

    def _wait(self) -> None:
        """Wait for the write in progress."""
        if self._writing is not None:
            self._writing.result()

    def _place(self, round_number: int) -> Path:
        return self._directory / f"{round_number:08d}"

    def _places(self) -> list[tuple[int, Path]]:
        if not self._directory.is_dir():
            return []
        return [(int(path.name), path) for path in self._directory.iterdir() if path.name.isdecimal()]

    def _write_bundle(self, round_number: int, bundle: AuditBundle) -> None:
        place = self._place(round_number)
        place.mkdir(parents=True, exist_ok=True)
        (place / BUNDLE).write_bytes(bundle.encode())

    def _write(self, round_number: int, root: bytes, blob: Buffer) -> None:
        place = self._place(round_number)
        place.mkdir(parents=True, exist_ok=True)
        path = place / root.hex()
        if path.exists():
            return
        view = memoryview(blob).cast("B")
        with contextlib.suppress(OSError):  # a round begins with the optimizer state that the one before ended with
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
            f"cannot write the audit bundle of round {round_number} to {self._directory} ({error.strerror}): free disk "
            "space, or an audit of that round will end as unserved"
        )


def read_blob(directory: Path, root: bytes, limit: int) -> bytes:
    """Return the verified blob of ``root``, of at most ``limit`` bytes, from a round's or case's directory.

    Raises :class:`BlobUnavailable`.
    """
    path = directory / root.hex()
    try:
        content = path.read_bytes() if path.stat().st_size <= limit else b""
    except OSError:
        content = b""
    if not content or index_blob(content).root != root:
        raise BlobUnavailable(f"blob {root.hex()[:8]} of {directory.name}")
    return content


def _index_of(path: Path, root: bytes) -> BlobIndex:
    """Index the file. Raises ``LookupError`` if its content no longer has ``root``."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        index = index_blob(content)
    if index.root != root:
        raise LookupError("the file was replaced or is corrupt")
    return index


def _chunk_of(path: Path, number: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), CHUNK, number * CHUNK)
