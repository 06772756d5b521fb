"""The systems that the exchange bench can measure, and what an exchange of each must move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from psyche.bench.exchange import ideal
from psyche.bench.exchange.links import Link
from psyche.errors import PsycheError
from psyche.numerics.codecs.registry import CODECS, codec

PROCESS_BYTES = {"psyche": 350_000_000, "hivemind": 450_000_000, "gloo": 250_000_000}
"""Of a peer without its vectors: Python, torch and the rest; measured here."""
PSYCHE_VECTORS = 7
"""θ, m, e, x, s, the gradients' sum, and payloads and buffers."""
HIVEMIND_VECTORS = 5
"""The vector itself, shared between its processes, and what it buffers of it; measured here."""

Kind = Literal["gather", "sharded", "auto"]
KINDS: tuple[Kind, ...] = ("gather", "sharded", "auto")


@dataclass(frozen=True)
class System:
    """One way to average."""

    name: str
    exchange: str
    codec: str
    reducers: int = 0
    """Of each slice, in a sharded exchange."""

    @property
    def led(self) -> bool:
        """Whether a process leads that exchanges nothing."""
        return self.name == "psyche"

    def memory(self, parameters: int) -> int:
        """Bytes that a peer's processes take at most, about."""
        vectors = {"psyche": PSYCHE_VECTORS, "hivemind": HIVEMIND_VECTORS, "gloo": 1}[self.name]
        return PROCESS_BYTES[self.name] + 4 * vectors * parameters

    def ideal_seconds(
        self, parameters: int, payload: int, links: Sequence[Link], served: Sequence[int]
    ) -> float | None:
        """At least, for payloads of that many bytes, until all peers ``served`` are done; None on unshaped links."""
        if all(link == Link() for link in links):
            return None
        if self.exchange == "sharded":
            result = codec(CODECS[self.codec].result_codec).expected_bytes(parameters)
            return ideal.sharded(payload, result, min(self.reducers, len(links)), links)
        if self.name == "psyche":
            return ideal.gather(payload, links, served)
        return ideal.all_reduce(payload, links)

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
            raise PsycheError(f"--{kind} {unknown[0]}: there is none of that name; there are {', '.join(known)}")
    return [System("psyche", exchange, codec, reducers) for codec in codecs for exchange in exchanges]
