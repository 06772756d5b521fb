"""Blobs on disk while they are of use: what is received or sent never has to fit in memory."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import Buffer

from psyche.errors import PsycheError
from psyche.numerics.digest import BlobIndex, index_chunks


class Blob:
    """A blob in a file without a name: chunk i is ``blob[i]``, read when asked for; some may not be there yet.

    The file vanishes with the object or the process. Chunks may be written and read on any thread.
    """

    def __init__(self, index: BlobIndex, descriptor: int) -> None:
        self.index = index
        self._descriptor = descriptor
        self._present = bytearray(index.chunks)
        self._lock = threading.Lock()
        self._closed = False

    def present(self, number: int) -> bool:
        """Whether chunk ``number`` has been written."""
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
        """A chunk. Raises ``LookupError`` where it is not here, or not any more."""
        if not 0 <= number < self.index.chunks:
            raise IndexError(number)
        with self._lock:
            if self._closed or not self._present[number]:
                raise LookupError(f"chunk {number} is not here")
            return os.pread(self._descriptor, self.index.sizes[number], self.index.offsets[number])

    def close(self) -> None:
        """Free the disk space."""
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
        """A blob of which nothing is there yet. Raises ``PsycheError`` where no file can be made."""
        try:
            if self._directory is not None:
                self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(prefix="psyche-", dir=self._directory) as file:
                return Blob(index, os.dup(file.fileno()))
        except OSError as error:
            where = self._directory or tempfile.gettempdir()
            raise PsycheError(f"cannot make a file in {where}: {error.strerror}; choose another --directory") from None

    def put(self, parts: Sequence[Buffer]) -> Blob:
        """A whole blob with one chunk for each part. Raises ``PsycheError`` where the disk is full."""
        blob = self.create(index_chunks(parts))
        for number, part in enumerate(parts):
            blob.write(number, part)
        return blob
