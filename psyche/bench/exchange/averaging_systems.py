"""The systems that the exchange bench can measure, and the least time that an exchange of each takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from psyche.bench.harness.shaped_links import Link
from psyche.errors import PsycheError
from psyche.numerics.codecs.registry import CODECS, codec

PROCESS_BYTES = {"psyche": 350_000_000, "hivemind": 450_000_000, "gloo": 250_000_000}
"""Memory of a peer without its vectors, as measured."""
PSYCHE_VECTORS = 7
"""θ, momentum, residual, local parameters, the sum of gradients, payloads and buffers."""
HIVEMIND_VECTORS = 5
"""The vector, shared between its processes, and its buffers, as measured."""

Kind = Literal["gather", "sharded", "auto"]
KINDS: tuple[Kind, ...] = ("gather", "sharded", "auto")


@dataclass(frozen=True)
class System:
    """One way to average."""

    name: str
    exchange: str
    codec: str
    reducers: int = 0
    """Reducers of each slice in a sharded exchange."""

    @property
    def has_coordinator(self) -> bool:
        """Whether there is a further process that exchanges nothing."""
        return self.name == "psyche"

    def memory(self, parameters: int) -> int:
        """Approximate peak memory of a peer's processes, in bytes."""
        vectors = {"psyche": PSYCHE_VECTORS, "hivemind": HIVEMIND_VECTORS, "gloo": 1}[self.name]
        return PROCESS_BYTES[self.name] + 4 * vectors * parameters

    def ideal_seconds(
        self, parameters: int, payload: int, links: Sequence[Link], served: Sequence[int]
    ) -> float | None:
        """Least time, for such payloads, until all peers ``served`` are done. ``None`` on unshaped links."""
        if all(link == Link() for link in links):
            return None
        if self.exchange == "sharded":
            result = codec(CODECS[self.codec].result_codec).expected_bytes(parameters)
            return sharded_seconds(payload, result, min(self.reducers, len(links)), links)
        if self.name == "psyche":
            return gather_seconds(payload, links, served)
        return all_reduce_seconds(payload, links)

    def __str__(self) -> str:
        kind = f"{self.exchange}/{self.reducers}" if self.exchange == "sharded" else self.exchange
        return f"{self.name} {kind} {self.codec}"


RIVALS = (
    System("hivemind", "butterfly", "fp32"),
    System("hivemind", "butterfly", "fp16"),
    System("gloo", "ring", "fp32"),
)


def own_systems(codecs: Sequence[str], exchanges: Sequence[str], reducers: int) -> list[System]:
    """psyche with each codec and exchange. Raises :class:`PsycheError` for a name that does not exist."""
    for kind, names, known in (("codec", codecs, CODECS), ("exchange", exchanges, KINDS)):
        if unknown := [name for name in names if name not in known]:
            raise PsycheError(f"--{kind} {unknown[0]}: unknown {kind}; choose from {', '.join(known)}")
    return [System("psyche", exchange, codec, reducers) for codec in codecs for exchange in exchanges]


# The least time of an exchange: the bytes that must cross the busiest link, over its rate.


def gather_seconds(payload: int, links: Sequence[Link], served: Sequence[int]) -> float:
    """Return every peer receives every payload (bytes), which any peer that has it may pass on.

    ``links`` are those of all peers, ``served`` the numbers of the peers that are waited for. Each payload leaves its
    author once, each served peer downloads all others, and all uplinks together send these downloads.
    """
    others = (len(links) - 1) * payload
    first = max(_seconds(payload, link.up) for link in links)
    last = max(_seconds(others, links[number].down) for number in served)
    sent = [link.up for link in links if link.up is not None]
    together = _seconds(len(served) * others, sum(sent)) if len(sent) == len(links) else 0.0
    return max(first, last, together)


def sharded_seconds(payload: int, result: int, reducers: int, links: Sequence[Link]) -> float:
    """Return each of n groups of slices goes to ``reducers`` peers (a peer reduces some itself), and its result to all.

    ``payload`` and ``result`` are bytes of the whole vector, encoded.
    """
    peers = len(links)
    return _busiest((reducers * (peers - 1) * payload + (peers - reducers) * result) / peers, links)


def all_reduce_seconds(size: int, links: Sequence[Link]) -> float:
    """Return a ring or a butterfly reduces parts of ``size`` bytes in all, and gathers the results."""
    return _busiest(2 * (len(links) - 1) / len(links) * size, links)


def _busiest(count: float, links: Sequence[Link]) -> float:
    return max(max(_seconds(count, link.up), _seconds(count, link.down)) for link in links)


def _seconds(count: float, bits: int | None) -> float:
    return 0.0 if bits is None else 8 * count / bits
