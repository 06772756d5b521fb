"""Writing shards: sequence i of a split is staged sequence π(i).

π is a keyed permutation of all sequences of the split: as random as a shuffle in memory, but it needs no memory and
gives the same order after any interruption. A shard gets its name once it is complete.
"""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from psyche.data.encoding import Tokens
from psyche.data.index import Shard
from psyche.durable import write_durably
from psyche.errors import PsycheError
from psyche.numerics.digest import blob_root, digest
from psyche.protocol.assignment import permute

SHARD_BYTES = 8 << 20
"""Size of a full shard. Members fetch whole shards, so one should not be much larger than a member's part of a round:
with 100 members and 800 sequences of 1024 tokens each, 64 MiB would be 41 times that part, and 8 MiB are 6 times."""

READERS = 16
"""Threads that read staged sequences: a disk serves random reads well only if many are queued."""

PIECE_BYTES = 1 << 20
"""Bytes read before the mapped pages are released. Reading a row may map 16 pages, which count as our memory."""


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.bin"


def order(split: str, span: range, count: int) -> NDArray[np.int64]:
    """π: the staged sequences (of ``count``) at the positions ``span`` of a split."""
    return permute(np.arange(span.start, span.stop, dtype=np.uint64), count, digest("shuffle", split.encode()))


@dataclass(frozen=True)
class Staged:
    """The sequences of a split in the order of their documents: the first ``sequences`` rows of the file ``path``."""

    path: Path
    sequences: int
    width: int
    """Tokens per sequence."""
    dtype: str

    @property
    def sequence_bytes(self) -> int:
        return self.width * np.dtype(self.dtype).itemsize


def write_shards(
    directory: Path, split: str, staged: Staged, shard_bytes: int, done: Callable[[int], None]
) -> tuple[Shard, ...]:
    """Shuffle ``staged`` into the shards ``<split>-00000.bin``, … of ``directory`` and return their entries.

    All but the last hold the same number of sequences, in ``shard_bytes`` or less. Existing shards are kept.
    ``done`` is called with the number of sequences of each. Raises :class:`PsycheError` if the disk is too full.
    """
    capacity = max(1, shard_bytes // staged.sequence_bytes)
    shards = []
    for number, start in enumerate(range(0, staged.sequences, capacity)):
        span = range(start, min(start + capacity, staged.sequences))
        path, size = directory / shard_name(split, number), len(span) * staged.sequence_bytes
        if path.is_file() and path.stat().st_size == size:
            root = blob_root(np.memmap(path, dtype=np.uint8, mode="r").data)
        else:
            require_room(directory, (staged.sequences - start) * staged.sequence_bytes)
            tokens = _gather(staged, order(split, span, staged.sequences))
            root = blob_root(tokens.data)
            write_durably(path, tokens.data)
        shards.append(Shard(file=path.name, sequences=len(span), bytes=size, root=root.hex()))
        done(len(span))
    return tuple(shards)


def require_room(directory: Path, needed: int) -> None:
    """Raise :class:`PsycheError` unless the disk of ``directory`` has ``needed`` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise PsycheError(
            f"shuffling needs {needed:,} more bytes in {directory}, {free:,} are free (until then, the disk holds "
            "the tokens twice): free disk space and run the command again to resume, or choose another directory "
            "with node.cache"
        )


def _gather(staged: Staged, rows: NDArray[np.int64]) -> Tokens:
    """``[len(rows), width]``."""
    out = np.empty((len(rows), staged.width), dtype=staged.dtype)
    with staged.path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    content.madvise(mmap.MADV_RANDOM)
    source = np.frombuffer(content, staged.dtype, staged.sequences * staged.width).reshape(-1, staged.width)
    piece = -(-PIECE_BYTES // staged.sequence_bytes)

    def read(part: tuple[NDArray[np.int64], Tokens]) -> None:
        source.take(part[0], axis=0, out=part[1], mode="clip")  # any other mode buffers the output

    with ThreadPoolExecutor(READERS, "shuffle") as pool:
        for at in range(0, len(rows), piece):
            parts = (np.array_split(array[at : at + piece], READERS) for array in (rows, out))
            list(pool.map(read, zip(*parts, strict=True)))
            content.madvise(mmap.MADV_DONTNEED)
    return out
