"""Token streams to shard files. A file only ever grows by whole sequences, so a crash is undone by one truncation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from psyche.data.index import Shard
from psyche.numerics.digest import blob_root

SHARD_BYTES = 64 << 20
"""Size of a full shard: small enough to fetch and hash in a moment, large enough to keep the index short."""


class SplitState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that is needed to go on with a split after a crash, if its files are :func:`intact`."""

    shards: tuple[Shard, ...] = ()
    bytes: int = 0
    """Valid bytes of the open shard, the one after ``shards``: whole sequences. The file may be longer."""
    carry: tuple[int, ...] = ()
    """Tokens of the sequence that is not yet full; fewer than ``sequence_length``."""


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.bin"


def intact(directory: Path, split: str, state: SplitState) -> bool:
    """Whether the split's files hold at least what ``state`` says they do."""
    expected = [(shard.file, shard.bytes) for shard in state.shards]
    if state.bytes:
        expected.append((shard_name(split, len(state.shards)), state.bytes))
    files = [(directory / name, size) for name, size in expected]
    return all(file.is_file() and file.stat().st_size >= size for file, size in files)


class SplitWriter:
    """Cuts a stream of tokens into sequences, and the sequences into the shards ``<split>-00000.bin``, …

    ``dtype`` is little-endian unsigned; every shard but the last holds the same number of sequences.
    """

    def __init__(
        self, directory: Path, split: str, dtype: str, sequence_length: int, shard_bytes: int, state: SplitState
    ) -> None:
        self._directory = directory
        self._split = split
        self._width = sequence_length
        self._shards = list(state.shards)
        self._carry = np.array(state.carry, dtype=dtype)
        self._sequence_bytes = sequence_length * self._carry.itemsize
        self._sequences = state.bytes // self._sequence_bytes
        self._capacity = max(1, shard_bytes // self._sequence_bytes)
        self._file: BinaryIO | None = None

    @property
    def full_shards(self) -> int:
        return len(self._shards)

    def add(self, tokens: list[int]) -> None:
        """Append tokens to the split."""
        stream = np.concatenate([self._carry, np.array(tokens, dtype=self._carry.dtype)])
        whole = len(stream) // self._width
        self._carry = stream[whole * self._width :].copy()
        rows = stream[: whole * self._width].reshape(whole, self._width)
        while len(rows):
            piece = rows[: self._capacity - self._sequences]
            self._open_shard().write(piece.data)
            self._sequences += len(piece)
            rows = rows[len(piece) :]
            if self._sequences == self._capacity:
                self._finish_shard()

    def sync(self) -> SplitState:
        """Put everything so far on the disk, and say how to go on from here."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return SplitState(tuple(self._shards), self._sequences * self._sequence_bytes, tuple(self._carry.tolist()))

    def finish(self) -> tuple[Shard, ...]:
        """End the last shard and drop the incomplete sequence. Returns all shards of the split."""
        if self._sequences:
            self._finish_shard()
        return tuple(self._shards)

    def close(self) -> None:
        """Let go of the open file, whatever state it is in."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _path(self) -> Path:
        return self._directory / shard_name(self._split, len(self._shards))

    def _open_shard(self) -> BinaryIO:
        if self._file is None:
            self._file = self._path.open("r+b" if self._sequences else "wb")
            self._file.truncate(self._sequences * self._sequence_bytes)
            self._file.seek(0, os.SEEK_END)
        return self._file

    def _finish_shard(self) -> None:
        path, size = self._path, self._sequences * self._sequence_bytes
        self._open_shard()  # a resumed shard may be longer than its valid part
        self.sync()
        self.close()
        root = blob_root(np.memmap(path, dtype=np.uint8, mode="r").data)
        self._shards.append(Shard(file=path.name, sequences=self._sequences, bytes=size, root=root.hex()))
        self._sequences = 0
