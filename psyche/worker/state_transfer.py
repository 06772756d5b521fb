"""Serve and fetch outer states as blobs, chunk by chunk: the present one from memory, older ones from checkpoints."""

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
    """Serve ``outer`` as it is now, whose chunk hashes are ``index``, in place of what was served as ``previous``.

    Chunks are read from live memory; the server checks each before sending, and answers "gone" once the next
    outer step has changed it.
    """
    if previous != index.root:
        network.blobs.remove(previous)
    network.blobs.add(index, list(chunked(outer.buffer)).__getitem__)


class Arriving:
    """An outer state on its way here, for a flat vector of ``size``; or several, one after the other.

    A run goes on while its state is fetched. Where it does so too soon, who takes the outer step on what has come so
    far has as much of the next state.
    """

    def __init__(self, size: int) -> None:
        self.outer = OuterState(torch.zeros(2, size))  # not empty(): stale memory could hold a chunk by chance
        self.gave: Counter[str] = Counter()
        """Bytes that came, by PeerID."""
        self.moved = 0
        """Outer steps that were taken on it."""
        self._began = time.monotonic()

    @property
    def received(self) -> int:
        """Bytes that came."""
        return self.gave.total()

    @property
    def seconds(self) -> float:
        """Since it was begun."""
        return time.monotonic() - self._began

    async def fetch(self, network: Network, root: bytes, sources: Sequence[str]) -> OuterState:
        """The state whose state_root is ``root``: what is not here of it is fetched.

        Raises ``FetchError``; what has come by then is kept.
        """
        order = in_pairs(self.outer.theta.numel())
        await network.blobs.fetch_into(root, self.outer.buffer, sources=sources, order=order, received_from=self.gave)
        return self.outer


def in_pairs(size: int) -> list[int]:
    """The chunks of an outer state, those of m next to those of θ that an outer step takes together with them."""
    momentum = 4 * size // CHUNK
    pairs = zip_longest(range(momentum), range(momentum, chunk_count(2 * 4 * size)))
    return [number for pair in pairs for number in pair if number is not None]


class Snapshots:
    """The states of the newest ``keep`` checkpoints that this process has written."""

    def __init__(self, network: Network, keep: int) -> None:
        self._network, self._keep = network, keep
        self._there: dict[int, tuple[BlobIndex, ReadChunk]] = {}

    @property
    def oldest(self) -> int:
        """The first round that one is of, once there are as many as are kept; 0 before."""
        return min(self._there) if len(self._there) == self._keep else 0

    def add(self, round_number: int, index: BlobIndex, path: Path) -> None:
        """Serve the outer state in the checkpoint file at ``path``, whose chunks are ``index``."""
        start = tensor_offset(path, TENSOR)

        def read(number: int) -> bytes:
            with path.open("rb") as file:
                return os.pread(file.fileno(), index.sizes[number], start + index.offsets[number])

        self._network.blobs.add(index, read)
        self._there[round_number] = index, read
        for old in sorted(self._there)[: -self._keep]:
            gone, reader = self._there.pop(old)
            self._network.blobs.remove(gone.root, reader)


def tensor_offset(path: Path, name: str) -> int:
    """Where in a safetensors file the bytes of a tensor begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    return _LENGTH_BYTES + length + int(header[name]["data_offsets"][0])
