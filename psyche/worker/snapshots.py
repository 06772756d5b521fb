"""Outer states of finished checkpoints, served from disk: who is fetching one goes on when the run does."""

from __future__ import annotations

import json
import os
from pathlib import Path

from psyche.network.transport import Network, ReadChunk
from psyche.numerics.digest import BlobIndex

TENSOR = "outer"
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, which is JSON; offsets count from the header's end."""


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
