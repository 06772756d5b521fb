"""Content addresses: one way to hash payloads, shards and the outer state.

A *blob* is a byte string split into chunks. Its address, the *root*, is the BLAKE3 hash of the sizes and BLAKE3 hashes
of its chunks, so a receiver can check the sizes before the first byte and each chunk before it uses it. A payload has
one chunk per slice; all other blobs have chunks of ``CHUNK`` bytes. The outer state is a blob, too (θ then m,
little-endian fp32): its root is the run's ``state_root``, and a joining node verifies it chunk by chunk.
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
"""Bytes per chunk of blobs other than payloads. 1 MiB keeps the index of a 56 GB state (7B parameters, θ and m) under 2
MB."""

MAX_CHUNK = 1 << 26
"""Maximum bytes of a chunk, which a receiver must hold before it can verify them."""

HASH_BYTES = 32


def digest(domain: str, *parts: bytes) -> bytes:
    """Hash length-prefixed ``parts`` with BLAKE3 under a domain name, so that different uses cannot collide. 32
    bytes."""
    hasher = _hasher(domain).copy()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return bytes(hasher.digest())


@lru_cache
def _hasher(domain: str) -> blake3:
    """Return a cached hasher for a domain: there are a few dozen, and absorbing one costs as much as hashing a short
    message."""
    from blake3 import blake3  # imported late: scripts/gpu_check.sh uses codecs where it is not installed

    return blake3(derive_key_context=f"psyche 1 {domain}")


@dataclass(frozen=True)
class BlobIndex:
    """The chunks of a blob: their sizes in bytes, and their concatenated 32-byte hashes."""

    sizes: tuple[int, ...]
    hashes: bytes

    @cached_property
    def root(self) -> bytes:
        """The blob's address, 32 bytes."""
        return digest("blob", self._packed_sizes, self.hashes)

    @cached_property
    def size(self) -> int:
        """Size of the blob in bytes."""
        return sum(self.sizes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The byte offset of each chunk."""
        return (0, *accumulate(self.sizes))[:-1]

    @property
    def chunks(self) -> int:
        return len(self.sizes)

    def encode(self) -> bytes:
        """Encode the index: all sizes (u32), then all hashes; ``INDEX_BYTES`` per chunk."""
        return self._packed_sizes + self.hashes

    @classmethod
    def decode(cls, data: Buffer) -> BlobIndex:
        """Invert :meth:`encode`. Raises ``ValueError`` for an invalid index."""
        view = memoryview(data).cast("B")
        chunks, rest = divmod(view.nbytes, INDEX_BYTES)
        if rest:
            raise ValueError("a truncated index")
        sizes = struct.unpack_from(f"<{chunks}I", view)
        if any(not 0 < size <= MAX_CHUNK for size in sizes):
            raise ValueError("an index with an empty or too large chunk")
        return cls(sizes, bytes(view[4 * chunks :]))

    def head(self, whole: int, rest: Buffer) -> BlobIndex:
        """Return the index of a blob that consists of the first ``whole`` chunks of this one, then the bytes
        ``rest``."""
        tail = index_blob(rest)
        return BlobIndex(self.sizes[:whole] + tail.sizes, self.hashes[: whole * HASH_BYTES] + tail.hashes)

    def matches(self, number: int, chunk: Buffer) -> bool:
        """Return whether ``chunk`` equals chunk ``number`` of the blob."""
        if not 0 <= number < self.chunks or memoryview(chunk).nbytes != self.sizes[number]:
            return False
        return _hash(chunk) == self.hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES]

    def shared(self, other: BlobIndex) -> list[bool]:
        """For each chunk, whether ``other`` has an equal one at the same index. All False if chunk sizes differ."""
        if self.sizes != other.sizes:
            return [False] * self.chunks
        ends = range(HASH_BYTES, len(self.hashes) + 1, HASH_BYTES)
        return [self.hashes[end - HASH_BYTES : end] == other.hashes[end - HASH_BYTES : end] for end in ends]

    @property
    def _packed_sizes(self) -> bytes:
        return struct.pack(f"<{len(self.sizes)}I", *self.sizes)


INDEX_BYTES = 4 + HASH_BYTES
"""Bytes per chunk of an encoded index."""


def index_chunks(parts: Iterable[Buffer]) -> BlobIndex:
    """Hash a blob with one chunk per part. Parts must not be empty."""
    views = [memoryview(part) for part in parts]
    return BlobIndex(tuple(view.nbytes for view in views), b"".join(_POOL.map(_hash, views)))


def index_blob(data: Buffer) -> BlobIndex:
    """Hash a contiguous buffer, without copying it, as a blob with chunks of ``CHUNK`` bytes."""
    return index_chunks(chunked(data))


def rehash(index: BlobIndex, data: Buffer, changed: Sequence[int]) -> BlobIndex:
    """Compute the index of ``data``, which differs from the blob of ``index`` only in the chunks ``changed``."""
    chunks, hashes = list(chunked(data)), bytearray(index.hashes)
    for number, found in zip(changed, _POOL.map(_hash, (chunks[number] for number in changed)), strict=True):
        hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES] = found
    return BlobIndex(index.sizes, bytes(hashes))


def _hash(chunk: Buffer) -> bytes:
    from blake3 import blake3

    return bytes(blake3(chunk).digest())


_POOL = ThreadPoolExecutor(os.cpu_count(), "hash")
"""BLAKE3 releases the GIL while it hashes."""


def chunked(data: Buffer) -> Iterator[memoryview]:
    """Split ``data`` into chunks of ``CHUNK`` bytes; the last one may be shorter."""
    view = memoryview(data).cast("B")
    return (view[at : at + CHUNK] for at in range(0, view.nbytes, CHUNK))


def blob_root(data: Buffer) -> bytes:
    """Compute the 32-byte address of a byte string."""
    return index_blob(data).root


def chunk_count(size: int) -> int:
    """Return the number of chunks of a byte string of ``size`` bytes."""
    return -(-size // CHUNK)


def payload_root(slices: Sequence[Buffer]) -> bytes:
    """Compute the 32-byte address of a payload, with one chunk per encoded slice."""
    return index_chunks(slices).root
