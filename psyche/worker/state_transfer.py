"""The outer state as a blob: every member serves its own, a joiner fetches it and checks it chunk by chunk."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

import torch

from psyche.network.transport import Network
from psyche.numerics.digest import CHUNK, BlobIndex, chunk_count, chunked
from psyche.numerics.outer import OuterState


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
