"""What an exchange costs a node, in bytes and seconds, either way. A test holds it against measured bytes."""

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
"""Of a blob fetched over one stream, besides index and chunks: the request's frame, root and flag, and the answer's."""
CHUNK_BYTES = 4 + 1
"""Of a chunk, besides its content: its number in the request, its status in the answer."""


TRUST = 2.0
"""Sharded must cost so many times fewer bytes than gather before ``auto`` takes it: with gather there is nobody whose
sums have to be believed, and nothing is encoded twice."""


@dataclass(frozen=True)
class Cost:
    """What one of several equal peers sends and receives in one exchange, in bytes."""

    up: int
    down: int

    def seconds(self, rate_up: float, rate_down: float) -> float:
        """At rates in bytes a second, where nothing but the line is waited for. Both directions are used at once."""
        return max(self.up / rate_up, self.down / rate_down)


@dataclass(frozen=True)
class Shapes:
    """What there is to exchange, in bytes."""

    payload: int
    """Chunks of a payload, with what each costs on the wire."""
    result: int
    """The same of all results together."""
    index: int
    """Of a payload, or of all results together; and a request."""

    @classmethod
    def of(cls, encoder: Codec, result: Codec, counts: Sequence[int]) -> Shapes:
        """For slices of ``counts`` parameters."""
        return cls(
            payload=sum(encoder.expected_bytes(count) + CHUNK_BYTES for count in counts),
            result=sum(result.expected_bytes(count) + CHUNK_BYTES for count in counts),
            index=STREAM_BYTES + INDEX_BYTES * len(counts),
        )

    def gather(self, peers: int) -> Cost:
        """Everybody fetches everybody's payload."""
        sent = (peers - 1) * (self.payload + self.index)
        return Cost(sent, sent)

    def sharded(self, peers: int, reducers: int) -> Cost:
        """Everybody fetches its groups' slices of everybody's payload (with the index of all of it), and the results
        of the groups it does not reduce."""
        reducers = min(reducers, peers)
        share = reducers / peers
        fetched = (peers - 1) * (share * self.payload + self.index)
        sent = round(fetched + (1 - share) * (self.result + self.index) + (peers - reducers) * STREAM_BYTES)
        return Cost(sent, sent)


def sharded_from(run: Run, fragments: Sequence[Sequence[slice]]) -> int | None:
    """The least number of members from which rounds are sharded: as the run says, or where it costs fewer bytes.

    Rates do not matter to this choice: both ways load the two directions of every line equally.
    """
    kind, reducers = run.exchange.kind, run.exchange.reducers
    if kind != "auto":
        return 2 if kind == "sharded" else None
    counts = [part.stop - part.start for part in max(fragments, key=len)]
    shapes = Shapes.of(codec(run.codec.name), codec(run.result_codec), counts)

    def cheaper(peers: int) -> bool:
        return TRUST * shapes.sharded(peers, reducers).up < shapes.gather(peers).up

    # Gather grows with every peer and sharded hardly does, so that once it is cheaper it stays so.
    first = bisect_left(range(2, MAX_MEMBERS + 1), True, key=cheaper)
    return None if first == MAX_MEMBERS - 1 else first + 2
