"""Held-out loss of a trial, at its end and on the way: against rounds, tokens and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from psyche.config import Run
from psyche.data.token_store import TokenStore
from psyche.numerics.codecs.base import HEADER_BYTES
from psyche.numerics.codecs.registry import codec
from psyche.numerics.codecs.topk2 import TopK2
from psyche.numerics.codecs.topk2e import TopK2e
from psyche.training.engine import Engine

if TYPE_CHECKING:
    from psyche.diloco.algorithm import Slices
    from psyche.diloco.replica import LocalUpdate

EVALUATED_AT_ONCE = 64
"""Held-out sequences of one forward pass."""


@dataclass(frozen=True)
class Point:
    """The outer parameters after a round."""

    rounds: int
    tokens: int
    """Tokens that all nodes together have trained on."""
    bytes_sent: float
    """Bytes of payloads that a node has sent to all others together, mean over nodes."""
    entropy_coded_bytes: float | None
    """The same if ``topk2e`` had encoded the values. ``None`` for codecs it does not apply to."""
    heldout_loss: float
    """Nats per token on the sequences of the curve."""


class Recorder:
    """Counts the bytes of a DiLoCo run, and evaluates its outer parameters at logarithmically spaced rounds."""

    def __init__(self, run: Run, points: int, sequences: range) -> None:
        self.points: list[Point] = []
        self._run, self._sequences = run, sequences
        self._evaluated = frozenset(evaluated_rounds(run.rounds.total, points))
        self._entropy_coder = entropy_coder(run.codec.name)
        self.payload_bytes = 0
        """Bytes of all payloads so far, all nodes together."""
        self._rounds = self._not_coded = 0
        self._coded = 0.0

    def record(self, works: Mapping[str, LocalUpdate], engine: Engine, store: TokenStore) -> None:
        """Record a round; ``engine`` holds the outer parameters that ``works`` led to."""
        produced = sum(len(part) for work in works.values() for part in work.payload)
        self._rounds += 1
        self.payload_bytes += produced
        self._not_coded += produced
        if self._rounds in self._evaluated:
            coded = self._code(works[min(works)].payload)
            others = (len(works) - 1) / len(works)  # each other node receives a copy; mean over nodes
            self.points.append(
                Point(
                    rounds=self._rounds,
                    tokens=self._rounds * self._run.rounds.inner_steps * self._run.tokens_per_step * len(works),
                    bytes_sent=self.payload_bytes * others,
                    entropy_coded_bytes=None if coded is None else coded * others,
                    heldout_loss=heldout_loss(engine, store, self._sequences),
                )
            )

    def _code(self, payload: Slices) -> float | None:
        """Estimate the entropy-coded bytes of all payloads so far, from ``payload`` for all since the last point."""
        if self._entropy_coder is None:
            return None
        coded = sum(HEADER_BYTES + len(self._entropy_coder.compress(memoryview(p)[HEADER_BYTES:])) for p in payload)
        self._coded += self._not_coded * coded / sum(map(len, payload))
        self._not_coded = 0
        return self._coded


def entropy_coder(name: str) -> TopK2e | None:
    """Return the entropy coder for payloads of codec ``name``, or ``None``."""
    fixed = codec(name)
    return TopK2e(fixed.kept) if isinstance(fixed, TopK2) else None


def evaluated_rounds(total: int, points: int) -> list[int]:
    """Choose at most ``points`` of the rounds 1 to ``total``, the last among them, denser at the start.

    Losses fall with the logarithm of tokens and bytes, and all bytes of one codec may be another's first rounds.
    """
    if points == 0:
        return []
    return sorted({round(total ** ((i + 1) / points)) for i in range(points)})


def heldout_loss(engine: Engine, store: TokenStore, sequences: range) -> float:
    """Mean loss, nats per token, of the held-out ``sequences`` that exist."""
    total, tokens = 0.0, 0
    there = [index for index in sequences if index < len(store.heldout)]
    for start in range(0, len(there), EVALUATED_AT_ONCE):
        loss, predicted = engine.evaluate(store.heldout.batch(there[start : start + EVALUATED_AT_ONCE]))
        total, tokens = total + loss, tokens + predicted
    return total / tokens
