"""Blobs applied by the outer steps of recent rounds, on disk: a restarted node re-applies them, late nodes fetch them.

One file per blob: its chunks, its index, and the number of chunks. The file gets its name (round number and root) once
it is on disk completely; its content is checked against the root whenever it is read all the same.
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
_MAX_CHUNKS = 1 << 20


@dataclass(frozen=True)
class _Entry:
    round: int
    index: BlobIndex
    read: ReadChunk


class PayloadJournal:
    """Blobs by root, each with the latest round that applied it. Thread-safe with one writer per blob."""

    def __init__(self, directory: Path, warn: Callable[[str], None]) -> None:
        """Open or create ``directory``. Deletes damaged files with a warning. Raises ``PsycheError`` on disk errors."""
        self._directory = directory
        self._entries: dict[bytes, _Entry] = {}
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
                        raise ValueError("its name and its index have different roots")
                except (OSError, ValueError) as error:
                    warn(f"deleted the damaged file {path} ({error}): its content will be fetched again if needed")
                    path.unlink(missing_ok=True)
                    continue
                self._entries[index.root] = _Entry(int(match[1]), index, partial(self._read, index.root))

    def __contains__(self, root: bytes) -> bool:
        return root in self._entries

    @property
    def blobs(self) -> list[BlobIndex]:
        """The index of every blob."""
        return [entry.index for entry in list(self._entries.values())]

    def reader(self, root: bytes) -> ReadChunk:
        """Return a function that reads the blob's chunks, unchecked; the same function for the same blob.

        It raises ``LookupError`` or ``OSError`` once they are gone.
        """
        return self._entries[root].read

    def put(self, round_number: int, blob: Blob) -> bool:
        """Write a complete blob that the outer step of ``round_number`` applies; it is on disk when this returns.

        Returns False if it was there before. Raises ``PsycheError`` where the disk is full.
        """
        index = blob.index
        if index.root in self._entries:
            return False
        path = self._path(round_number, index.root)
        with disk_errors(path, "--directory"):
            blob.link(path, index.encode() + index.chunks.to_bytes(_COUNT_BYTES, "little"))
            sync_directory(self._directory)
        entry = _Entry(round_number, index, partial(self._read, index.root))
        return self._entries.setdefault(index.root, entry) is entry  # another thread may have been faster

    def blob(self, root: bytes) -> Blob | None:
        """Return a blob with every chunk checked, or None. A blob that the disk has corrupted is dropped."""
        entry = self._entries.get(root)
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
        """Delete a blob."""
        if (entry := self._entries.pop(root, None)) is not None:
            self._path(entry.round, root).unlink(missing_ok=True)

    def before(self, first: int) -> list[bytes]:
        """Roots of blobs that only rounds before ``first`` applied."""
        return [root for root, entry in list(self._entries.items()) if entry.round < first]

    def _read(self, root: bytes, number: int) -> bytes:
        entry = self._entries[root]
        with self._path(entry.round, root).open("rb") as file:
            return os.pread(file.fileno(), entry.index.sizes[number], entry.index.offsets[number])

    def _path(self, round_number: int, root: bytes) -> Path:
        return self._directory / f"{round_number:08d}-{root.hex()}.blob"


def _index_of(path: Path) -> BlobIndex:
    """Read the index at the end of a file. Raises ``ValueError`` if the file is incomplete."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        tail = os.pread(file.fileno(), _COUNT_BYTES, max(0, size - _COUNT_BYTES))
        chunks = int.from_bytes(tail, "little")
        length = chunks * INDEX_BYTES
        if len(tail) < _COUNT_BYTES or not 0 < chunks <= _MAX_CHUNKS or length > size - _COUNT_BYTES:
            raise ValueError("it is truncated")
        index = BlobIndex.decode(os.pread(file.fileno(), length, size - _COUNT_BYTES - length))
    if index.size + length + _COUNT_BYTES != size:
        raise ValueError("it is truncated")
    return index
