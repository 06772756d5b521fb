"""Serve and fetch outer states as blobs, chunk by chunk: the current one from memory, older ones from checkpoints."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import torch

from psyche.network.transport import Network, ReadChunk
from psyche.numerics.digest import CHUNK, BlobIndex, chunk_count, chunked
from psyche.numerics.outer import OuterState

TENSOR = "outer"
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, which is JSON; offsets count from the header's end."""


def serve_state(network: Network, outer: OuterState, index: BlobIndex, previous: bytes) -> None:
    """Serve ``outer``, whose chunk hashes are ``index``, and stop serving the state with root ``previous``.

    Chunks are read from live memory. The server checks the hash of each before sending, and answers "gone" after the
    next outer step has changed it.
    """
    if previous != index.root:
        network.blobs.remove(previous)
    network.blobs.add(index, list(chunked(outer.buffer)).__getitem__)


class PartialState:
    """An outer state that is being fetched, for a flat vector of ``size`` parameters.

    The run continues during the download. When its state changes, the node takes the same outer step on the chunks
    received so far, which makes them chunks of the new state.
    """

    def __init__(self, size: int) -> None:
        self.outer = OuterState(torch.zeros(2, size))  # not empty(): stale memory could hold a chunk by chance
        self.gave: Counter[str] = Counter()
        """Bytes received, by PeerID."""
        self.moved = 0
        """Outer steps taken on it."""
        self._began = time.monotonic()

    @property
    def received(self) -> int:
        """Bytes received."""
        return self.gave.total()

    @property
    def seconds(self) -> float:
        """Seconds since the fetch began."""
        return time.monotonic() - self._began

    async def fetch(self, network: Network, root: bytes, sources: Sequence[str]) -> OuterState:
        """Fetch the missing chunks of the state with state root ``root``, and return it.

        Raises ``FetchError``; the chunks received by then are kept.
        """
        order = paired_chunks(self.outer.theta.numel())
        await network.blobs.fetch_into(root, self.outer.buffer, sources=sources, order=order, received_from=self.gave)
        return self.outer


def paired_chunks(size: int) -> list[int]:
    """Order the chunks of an outer state so that each chunk of m follows the chunk of θ it is updated with."""
    momentum = 4 * size // CHUNK
    pairs = zip_longest(range(momentum), range(momentum, chunk_count(2 * 4 * size)))
    return [number for pair in pairs for number in pair if number is not None]


class Snapshots:
    """Serves the outer states of the newest ``keep`` checkpoints that this process has written."""

    def __init__(self, network: Network, keep: int) -> None:
        self._network, self._keep = network, keep
        self._held: dict[int, tuple[BlobIndex, ReadChunk]] = {}

    @property
    def oldest(self) -> int:
        """The round of the oldest one once ``keep`` are held; 0 before that."""
        return min(self._held) if len(self._held) == self._keep else 0

    def add(self, round_number: int, index: BlobIndex, path: Path) -> None:
        """Serve the outer state in the checkpoint file at ``path``, whose chunk hashes are ``index``."""
        start = tensor_offset(path, TENSOR)

        def read(number: int) -> bytes:
            with path.open("rb") as file:
                return os.pread(file.fileno(), index.sizes[number], start + index.offsets[number])

        self._network.blobs.add(index, read)
        self._held[round_number] = index, read
        for old in sorted(self._held)[: -self._keep]:
            gone, reader = self._held.pop(old)
            self._network.blobs.remove(gone.root, reader)


def tensor_offset(path: Path, name: str) -> int:
    """Return the offset in bytes at which a tensor's data begins in a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    return _LENGTH_BYTES + length + int(header[name]["data_offsets"][0])
