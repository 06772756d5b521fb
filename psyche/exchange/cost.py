"""The cost model: bytes and seconds that one exchange takes a node, gather or sharded.

``tests/exchange/test_cost.py`` compares it with the bytes that real nodes move.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from psyche.config import Run
from psyche.numerics.codecs.base import Codec
from psyche.numerics.codecs.registry import codec
from psyche.numerics.digest import HASH_BYTES, INDEX_BYTES
from psyche.protocol.wire import MAX_MEMBERS

STREAM_BYTES = 4 + HASH_BYTES + 1 + 1 + 4
"""Overhead of a blob on one stream besides index and chunks: the request's frame, root and flag, and the answer's
status and frame."""
CHUNK_BYTES = 4 + 1
"""Overhead of a chunk: its number in the request, its status in the answer."""
SHARDED_ADVANTAGE = 2.0
"""``auto`` chooses sharded only if it costs this many times fewer bytes: gather needs no trust in reducers, and encodes
nothing twice."""


@dataclass(frozen=True)
class Cost:
    """Bytes that one of several equal peers sends and receives in one exchange."""

    up: int
    down: int

    def seconds(self, rate_up: float, rate_down: float) -> float:
        """Transfer time at rates in bytes per second. Both directions are used at once."""
        return max(self.up / rate_up, self.down / rate_down)


@dataclass(frozen=True)
class ExchangeSizes:
    """Bytes of the parts of an exchange, with their overhead on the wire."""

    payload: int
    """All chunks of one payload."""
    result: int
    """All chunks of all results together."""
    index: int
    """The index of one payload (or of all results together) and the request for it."""

    @classmethod
    def of(cls, encoder: Codec, result: Codec, counts: Sequence[int]) -> ExchangeSizes:
        """Sizes for slices of ``counts`` parameters each."""
        return cls(
            payload=sum(encoder.expected_bytes(count) + CHUNK_BYTES for count in counts),
            result=sum(result.expected_bytes(count) + CHUNK_BYTES for count in counts),
            index=STREAM_BYTES + INDEX_BYTES * len(counts),
        )

    def gather(self, peers: int) -> Cost:
        """Cost per peer if every peer fetches every payload."""
        sent = (peers - 1) * (self.payload + self.index)
        return Cost(sent, sent)

    def sharded(self, peers: int, reducers: int) -> Cost:
        """Cost per peer if each slice is reduced by ``reducers`` peers.

        A peer fetches its groups' slices of every payload (with the whole index), and the results of other groups.
        """
        reducers = min(reducers, peers)
        share = reducers / peers
        fetched = (peers - 1) * (share * self.payload + self.index)
        sent = round(fetched + (1 - share) * (self.result + self.index) + (peers - reducers) * STREAM_BYTES)
        return Cost(sent, sent)


def sharded_from(run: Run, fragments: Sequence[Sequence[slice]]) -> int | None:
    """Return the smallest number of members at which rounds are sharded: by configuration, or where it costs fewer
    bytes.

    None: never. Line rates do not matter, because both ways load the two directions of every line equally.
    """
    kind, reducers = run.exchange.kind, run.exchange.reducers
    if kind != "auto":
        return 2 if kind == "sharded" else None
    counts = [part.stop - part.start for part in max(fragments, key=len)]
    sizes = ExchangeSizes.of(codec(run.codec.name), codec(run.result_codec), counts)

    def cheaper(peers: int) -> bool:
        return SHARDED_ADVANTAGE * sizes.sharded(peers, reducers).up < sizes.gather(peers).up

    # The cost of gather grows with the peers and that of sharded hardly does: once sharded is cheaper, it stays so.
    first = bisect_left(range(2, MAX_MEMBERS + 1), True, key=cheaper)
    return None if first == MAX_MEMBERS - 1 else first + 2
