"""Content addresses: one way to hash a payload, a shard, or the outer state.

A *blob* is a byte string cut into chunks of ``CHUNK`` bytes. Its address (*root*) is the BLAKE3 hash of its
size and its chunks' BLAKE3 hashes, so that whoever fetches it can check the size before the first byte and
every chunk before it is used. The outer state is a blob too (θ then m, little-endian fp32): its root is the
run's ``state_root`` (DESIGN §5), and a joiner verifies it chunk by chunk with no further machinery.
"""

from __future__ import annotations

from dataclasses import dataclass

from blake3 import blake3
from typing_extensions import Buffer

CHUNK = 1 << 20
"""Bytes of one chunk. 1 MiB keeps the index of a 56 GB state (7B parameters, θ and m) under 2 MB."""

HASH_BYTES = 32


def digest(domain: str, *parts: bytes) -> bytes:
    """BLAKE3 of length-prefixed ``parts`` under a domain name, so that no two uses can collide. 32 bytes."""
    hasher = blake3(derive_key_context=f"psyche 1 {domain}")
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return bytes(hasher.digest())


@dataclass(frozen=True)
class BlobIndex:
    """Size of a blob in bytes, and the concatenated 32-byte hashes of its chunks."""

    size: int
    hashes: bytes

    @property
    def root(self) -> bytes:
        """The blob's address, 32 bytes."""
        return digest("blob", self.size.to_bytes(8, "little"), self.hashes)

    @property
    def chunks(self) -> int:
        return chunk_count(self.size)

    def well_formed(self) -> bool:
        """Whether there is exactly one hash a chunk; checked before an index from a peer is believed."""
        return self.size >= 0 and len(self.hashes) == HASH_BYTES * self.chunks

    def matches(self, number: int, chunk: Buffer) -> bool:
        """Whether ``chunk`` is the blob's chunk ``number``, to the bit."""
        length = memoryview(chunk).nbytes
        if not 0 <= number < self.chunks or length != min(CHUNK, self.size - number * CHUNK):
            return False
        return bytes(blake3(chunk).digest()) == self.hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES]


def chunk_count(size: int) -> int:
    """How many chunks a blob of ``size`` bytes has."""
    return -(-size // CHUNK)


def index_blob(data: Buffer) -> BlobIndex:
    """Hash a blob of any contiguous buffer, without copying it."""
    view = memoryview(data).cast("B")
    hashes = [blake3(view[at : at + CHUNK], max_threads=1).digest() for at in range(0, view.nbytes, CHUNK)]
    return BlobIndex(view.nbytes, b"".join(hashes))


def blob_root(data: Buffer) -> bytes:
    """The 32-byte address of a blob."""
    return index_blob(data).root
