"""Temporary files for blobs that are being received or served, so that they need not fit in memory."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from typing_extensions import Buffer

from psyche.errors import PsycheError
from psyche.numerics.digest import BlobIndex, index_chunks

UNFINISHED = ".tmp"
"""Suffix of a copy that is being written."""


class Blob:
    """A blob in an unnamed file: chunk i is ``blob[i]``, read on demand; some chunks may be missing.

    The file vanishes with the object or the process. Chunks may be written and read on any thread.
    """

    def __init__(self, index: BlobIndex, descriptor: int) -> None:
        self.index = index
        self._descriptor = descriptor
        self._present = bytearray(index.chunks)
        self._lock = threading.Lock()
        self._closed = False

    def present(self, number: int) -> bool:
        """Return whether chunk ``number`` has been written."""
        return bool(self._present[number])

    @property
    def complete(self) -> bool:
        return all(self._present)

    def write(self, number: int, chunk: Buffer) -> None:
        """Put chunk ``number``, which was checked against the index, in its place.

        Raises ``PsycheError`` where the disk is full.
        """
        view, offset = memoryview(chunk).cast("B"), self.index.offsets[number]
        try:
            with self._lock:  # the descriptor may belong to another file once this one is closed
                if self._closed:
                    return  # nobody wants it any more
                while view:  # a disk that fills up takes a part
                    written = os.pwrite(self._descriptor, view, offset)
                    view, offset = view[written:], offset + written
                self._present[number] = 1
        except OSError as error:
            raise PsycheError(
                f"cannot keep what is received: {error.strerror}; free some disk space or choose another --directory"
            ) from None

    def __getitem__(self, number: int) -> bytes:
        """Return a chunk. Raises ``LookupError`` where it is not here, or not any more."""
        if not 0 <= number < self.index.chunks:
            raise IndexError(number)
        with self._lock:
            if self._closed or not self._present[number]:
                raise LookupError(f"chunk {number} is not here")
            return os.pread(self._descriptor, self.index.sizes[number], self.index.offsets[number])

    @classmethod
    def of(cls, index: BlobIndex, descriptor: int) -> Self:
        """Return a whole blob, whose chunks are at the start of an open file; the file is the blob's to close."""
        blob = cls(index, descriptor)
        blob._present = bytearray(b"\1" * index.chunks)
        return blob

    def link(self, path: Path, tail: bytes) -> None:
        """Give the blob, which must be complete, a name, with ``tail`` after its last chunk; on disk when this returns.

        Raises ``OSError``.
        """
        assert self.complete, "a blob is named once it is whole"
        with self._lock:
            descriptor = os.dup(self._descriptor)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.pwrite(descriptor, tail, self.index.size)
            os.fsync(descriptor)
            try:  # the file as it is, without a copy
                os.link(f"/proc/self/fd/{descriptor}", path.name, src_dir_fd=directory, dst_dir_fd=directory)
            except FileExistsError:
                pass
            except OSError:
                _copy(descriptor, path)
        finally:
            os.close(directory)
            os.close(descriptor)

    def close(self) -> None:
        """Free the disk space, unless the file has a name."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._descriptor)

    def __del__(self) -> None:
        self.close()


class Spool:
    """Makes blobs in ``directory``, or where the system keeps its temporary files."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory

    def create(self, index: BlobIndex) -> Blob:
        """Return a blob of which nothing is there yet. Raises ``PsycheError`` where no file can be made."""
        try:
            if self._directory is not None:
                self._directory.mkdir(parents=True, exist_ok=True)
            return Blob(index, _nameless(self._directory or Path(tempfile.gettempdir())))
        except OSError as error:
            where = self._directory or tempfile.gettempdir()
            raise PsycheError(f"cannot make a file in {where}: {error.strerror}; choose another --directory") from None

    def put(self, parts: Sequence[Buffer]) -> Blob:
        """Return a whole blob with one chunk for each part. Raises ``PsycheError`` where the disk is full."""
        blob = self.create(index_chunks(parts))
        for number, part in enumerate(parts):
            blob.write(number, part)
        return blob


def _nameless(directory: Path) -> int:
    """Return an open file without a name in ``directory``: one that can still be given one, where the system has
    such."""
    with contextlib.suppress(OSError, AttributeError):  # not on every file system, nor on every system
        return os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
    with tempfile.TemporaryFile(prefix="psyche-", dir=directory) as file:
        return os.dup(file.fileno())


def _copy(descriptor: int, path: Path) -> None:
    """A copy of an open file at ``path``, whole or absent."""
    temporary = path.with_name(path.name + UNFINISHED)
    with temporary.open("wb") as file:
        offset = 0
        while piece := os.pread(descriptor, 1 << 20, offset):
            file.write(piece)
            offset += len(piece)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
