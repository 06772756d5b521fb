"""What the outer steps of the last rounds took, on disk: a node that was killed takes them again, others fetch them.

A file for each blob: its chunks, its index, and how many chunks that has. It gets its name, which holds the round and
the blob's root, once it is on disk whole; what is read from it is checked against the root all the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from psyche.durable import disk_errors, sync_directory
from psyche.network.spool import UNFINISHED, Blob
from psyche.network.transport import ReadChunk
from psyche.numerics.digest import INDEX_BYTES, BlobIndex

DIRECTORY = "journal"
_NAME = re.compile(r"(\d{8})-([0-9a-f]{64})\.blob")
_COUNT_BYTES = 4
MAX_CHUNKS = 1 << 20


@dataclass(frozen=True)
class _Entry:
    round: int
    index: BlobIndex
    read: ReadChunk


class Journal:
    """Blobs by root, each with the latest round that took it. Safe to use from several threads, one writer a blob."""

    def __init__(self, directory: Path, warn: Callable[[str], None]) -> None:
        """Take up what is in ``directory``, which is made. Raises ``PsycheError`` where that cannot be."""
        self._directory = directory
        self._there: dict[bytes, _Entry] = {}
        with disk_errors(directory, "--directory"):
            directory.mkdir(parents=True, exist_ok=True)
            for path in sorted(directory.iterdir()):
                match = _NAME.fullmatch(path.name)
                if match is None:
                    if path.suffix == UNFINISHED:
                        path.unlink()
                    continue
                try:
                    index = _index_of(path)
                    if index.root.hex() != match[2]:
                        raise ValueError("its index is another blob's")
                except (OSError, ValueError) as error:
                    warn(f"{path.name} in the journal cannot be read ({error}): what it held is fetched again")
                    path.unlink(missing_ok=True)
                    continue
                self._there[index.root] = _Entry(int(match[1]), index, partial(self._read, index.root))

    def __contains__(self, root: bytes) -> bool:
        return root in self._there

    @property
    def blobs(self) -> list[BlobIndex]:
        """All that are there."""
        return [entry.index for entry in list(self._there.values())]

    def reader(self, root: bytes) -> ReadChunk:
        """Gives the chunks of a blob that is there, always the same for the same blob. They are not checked.

        It raises ``LookupError`` or ``OSError`` where they are not there any more.
        """
        return self._there[root].read

    def put(self, round_number: int, blob: Blob) -> bool:
        """Keep a whole blob that the outer step of ``round`` takes; on disk when this returns. False: it was there.

        Raises ``PsycheError`` where the disk is full.
        """
        index = blob.index
        if index.root in self._there:
            return False
        path = self._path(round_number, index.root)
        with disk_errors(path, "--directory"):
            blob.link(path, index.encode() + index.chunks.to_bytes(_COUNT_BYTES, "little"))
            sync_directory(self._directory)
        entry = _Entry(round_number, index, partial(self._read, index.root))
        return self._there.setdefault(index.root, entry) is entry  # another thread may have been as fast

    def blob(self, root: bytes) -> Blob | None:
        """A blob, every chunk of it checked; None where it is not there. What the disk has spoilt is dropped."""
        entry = self._there.get(root)
        if entry is None:
            return None
        index = entry.index
        try:
            with self._path(entry.round, root).open("rb") as file:
                blob = Blob.of(index, os.dup(file.fileno()))
            if all(index.matches(number, blob[number]) for number in range(index.chunks)):
                return blob
        except OSError:
            pass
        self.drop(root)
        return None

    def drop(self, root: bytes) -> None:
        """Forget a blob."""
        if (entry := self._there.pop(root, None)) is not None:
            self._path(entry.round, root).unlink(missing_ok=True)

    def before(self, first: int) -> list[bytes]:
        """Roots of what only rounds before ``first`` took."""
        return [root for root, entry in list(self._there.items()) if entry.round < first]

    def _read(self, root: bytes, number: int) -> bytes:
        entry = self._there[root]
        with self._path(entry.round, root).open("rb") as file:
            return os.pread(file.fileno(), entry.index.sizes[number], entry.index.offsets[number])

    def _path(self, round_number: int, root: bytes) -> Path:
        return self._directory / f"{round_number:08d}-{root.hex()}.blob"


def _index_of(path: Path) -> BlobIndex:
    """The index at the end of a file. Raises ``ValueError`` where there is none."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        tail = os.pread(file.fileno(), _COUNT_BYTES, max(0, size - _COUNT_BYTES))
        chunks = int.from_bytes(tail, "little")
        length = chunks * INDEX_BYTES
        if len(tail) < _COUNT_BYTES or not 0 < chunks <= MAX_CHUNKS or length > size - _COUNT_BYTES:
            raise ValueError("it was cut off")
        index = BlobIndex.decode(os.pread(file.fileno(), length, size - _COUNT_BYTES - length))
    if index.size + length + _COUNT_BYTES != size:
        raise ValueError("it was cut off")
    return index
