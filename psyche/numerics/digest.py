"""Content addresses: one way to hash a payload, a shard, or the outer state.

A *blob* is a byte string cut into chunks. Its address (*root*) is the BLAKE3 hash of its chunks' sizes and BLAKE3
hashes, so that whoever fetches it can check the sizes before the first byte and every chunk before it is used. A
payload has a chunk for each slice, everything else chunks of ``CHUNK`` bytes. The outer state is a blob too (θ then m,
little-endian fp32): its root is the run's ``state_root`` (DESIGN §5), and a joiner verifies it chunk by chunk with
no further machinery.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from typing_extensions import Buffer

if TYPE_CHECKING:
    from blake3 import blake3

CHUNK = 1 << 20
"""Bytes of one chunk where the content does not say otherwise. 1 MiB keeps the index of a 56 GB state (7B parameters,
θ and m) under 2 MB."""

MAX_CHUNK = 1 << 26
"""The most bytes a chunk may have: what a reader has to hold before it can check anything."""

HASH_BYTES = 32


def digest(domain: str, *parts: bytes) -> bytes:
    """BLAKE3 of length-prefixed ``parts`` under a domain name, so that no two uses can collide. 32 bytes."""
    hasher = _begun(domain).copy()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return bytes(hasher.digest())


@lru_cache
def _begun(domain: str) -> blake3:
    """A hasher that knows its domain: there are a few dozen, and to take one in costs as much as a short message."""
    from blake3 import blake3  # here: codecs and kernels are imported where it is not installed (scripts/gpu_check.sh)

    return blake3(derive_key_context=f"psyche 1 {domain}")


@dataclass(frozen=True)
class BlobIndex:
    """A blob's chunks: their sizes in bytes, and their 32-byte hashes one after the other."""

    sizes: tuple[int, ...]
    hashes: bytes

    @cached_property
    def root(self) -> bytes:
        """The blob's address, 32 bytes."""
        return digest("blob", self._packed_sizes, self.hashes)

    @cached_property
    def size(self) -> int:
        """Bytes of the whole blob."""
        return sum(self.sizes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each chunk starts."""
        return (0, *accumulate(self.sizes))[:-1]

    @property
    def chunks(self) -> int:
        return len(self.sizes)

    def encode(self) -> bytes:
        """``INDEX_BYTES`` for each chunk: all sizes (u32), then all hashes."""
        return self._packed_sizes + self.hashes

    @classmethod
    def decode(cls, data: Buffer) -> BlobIndex:
        """Inverse of :meth:`encode`. Raises ``ValueError`` on what no blob has."""
        view = memoryview(data).cast("B")
        chunks, rest = divmod(view.nbytes, INDEX_BYTES)
        if rest:
            raise ValueError("an index that is cut off")
        sizes = struct.unpack_from(f"<{chunks}I", view)
        if any(not 0 < size <= MAX_CHUNK for size in sizes):
            raise ValueError("a chunk of no bytes, or of too many")
        return cls(sizes, bytes(view[4 * chunks :]))

    def head(self, whole: int, rest: Buffer) -> BlobIndex:
        """The index of a blob of which this one's first ``whole`` chunks, and then the bytes ``rest`` are all."""
        tail = index_blob(rest)
        return BlobIndex(self.sizes[:whole] + tail.sizes, self.hashes[: whole * HASH_BYTES] + tail.hashes)

    def matches(self, number: int, chunk: Buffer) -> bool:
        """Whether ``chunk`` is the blob's chunk ``number``, to the bit."""
        if not 0 <= number < self.chunks or memoryview(chunk).nbytes != self.sizes[number]:
            return False
        return _hash(chunk) == self.hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES]

    def shared(self, other: BlobIndex) -> list[bool]:
        """Of each chunk, whether ``other`` has the same one in the same place; of blobs cut alike, that is."""
        if self.sizes != other.sizes:
            return [False] * self.chunks
        ends = range(HASH_BYTES, len(self.hashes) + 1, HASH_BYTES)
        return [self.hashes[end - HASH_BYTES : end] == other.hashes[end - HASH_BYTES : end] for end in ends]

    @property
    def _packed_sizes(self) -> bytes:
        return struct.pack(f"<{len(self.sizes)}I", *self.sizes)


INDEX_BYTES = 4 + HASH_BYTES
"""Of an encoded index, for each chunk."""


def index_chunks(parts: Iterable[Buffer]) -> BlobIndex:
    """The index of a blob with one chunk for each part, none of them empty."""
    pieces = [memoryview(part) for part in parts]
    return BlobIndex(tuple(piece.nbytes for piece in pieces), b"".join(_POOL.map(_hash, pieces)))


def index_blob(data: Buffer) -> BlobIndex:
    """Hash any contiguous buffer, without copying it, as a blob with chunks of ``CHUNK`` bytes."""
    return index_chunks(chunked(data))


def rehash(index: BlobIndex, data: Buffer, changed: Sequence[int]) -> BlobIndex:
    """The index of ``data``, of which chunks other than ``changed`` are those of ``index``."""
    pieces, hashes = list(chunked(data)), bytearray(index.hashes)
    for number, found in zip(changed, _POOL.map(_hash, (pieces[number] for number in changed)), strict=True):
        hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES] = found
    return BlobIndex(index.sizes, bytes(hashes))


def _hash(chunk: Buffer) -> bytes:
    from blake3 import blake3

    return bytes(blake3(chunk).digest())


_POOL = ThreadPoolExecutor(os.cpu_count(), "hash")
"""BLAKE3 lets go of the interpreter while it hashes."""


def chunked(data: Buffer) -> Iterator[memoryview]:
    """``data`` in pieces of ``CHUNK`` bytes, the last one shorter."""
    view = memoryview(data).cast("B")
    return (view[at : at + CHUNK] for at in range(0, view.nbytes, CHUNK))


def blob_root(data: Buffer) -> bytes:
    """The 32-byte address of a byte string."""
    return index_blob(data).root


def chunk_count(size: int) -> int:
    """How many chunks a byte string of ``size`` has."""
    return -(-size // CHUNK)


def payload_root(slices: Sequence[Buffer]) -> bytes:
    """The 32-byte address of a payload: a chunk for each encoded slice."""
    return index_chunks(slices).root
