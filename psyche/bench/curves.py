"""What a trial is judged on, and how its loss falls with every round, token and byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from psyche.config import Run
from psyche.data.store import TokenStore
from psyche.numerics.codecs.base import HEADER_BYTES
from psyche.numerics.codecs.registry import codec
from psyche.numerics.codecs.topk2 import TopK2
from psyche.numerics.codecs.topk2e import TopK2e
from psyche.training.engine import Engine

if TYPE_CHECKING:
    from psyche.diloco.local_update import Slices, Work

JUDGED_AT_ONCE = 64
"""Held-out sequences of one forward pass."""


@dataclass(frozen=True)
class Point:
    """The outer parameters after some round."""

    rounds: int
    tokens: int
    """Trained on until then, all nodes together."""
    bytes_sent: float
    """Until then by a node to all others together, the mean over nodes: the payloads themselves."""
    entropy_coded_bytes: float | None
    """The same, had ``topk2e`` carried the values; None for codecs that it does not carry."""
    heldout_loss: float
    """Nats a token, on the sequences of the curve."""


class Recorder:
    """Counts what a DiLoCo run sends, and judges its outer parameters at rounds spaced evenly by their logarithm."""

    def __init__(self, run: Run, points: int, sequences: range) -> None:
        self.points: list[Point] = []
        self._run, self._sequences = run, sequences
        self._judged = frozenset(judged_rounds(run.rounds.total, points))
        self._entropy_coder = entropy_coder(run.codec.name)
        self.payload_bytes = 0
        """Of all payloads so far, all nodes together."""
        self._rounds = self._not_coded = 0
        self._coded = 0.0

    def saw(self, works: Mapping[str, Work], engine: Engine, store: TokenStore) -> None:
        """Once a round, when ``engine`` holds the outer parameters that ``works`` led to."""
        produced = sum(len(part) for work in works.values() for part in work.payload)
        self._rounds += 1
        self.payload_bytes += produced
        self._not_coded += produced
        if self._rounds in self._judged:
            coded = self._code(works[min(works)].payload)
            others = (len(works) - 1) / len(works)  # of which each gets a copy; then the mean over nodes
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
        """All payloads so far, entropy-coded: what coding saves varies little from one to the next, so that
        ``payload`` speaks for all since the point before."""
        if self._entropy_coder is None:
            return None
        coded = sum(HEADER_BYTES + len(self._entropy_coder.compress(memoryview(p)[HEADER_BYTES:])) for p in payload)
        self._coded += self._not_coded * coded / sum(map(len, payload))
        self._not_coded = 0
        return self._coded


def entropy_coder(name: str) -> TopK2e | None:
    """What codes the payloads of codec ``name`` further; None where nothing does."""
    fixed = codec(name)
    return TopK2e(fixed.kept) if isinstance(fixed, TopK2) else None


def judged_rounds(total: int, points: int) -> list[int]:
    """At most ``points`` of the rounds 1 to ``total``, the last among them, denser at the start: losses fall with the
    logarithm of tokens and bytes, and a cheap codec's whole traffic is a dear one's first rounds."""
    if points == 0:
        return []
    return sorted({round(total ** ((i + 1) / points)) for i in range(points)})


def heldout_loss(engine: Engine, store: TokenStore, sequences: range) -> float:
    """Mean loss, nats a token, over those of the held-out sequences, or as many of them as there are."""
    total, tokens = 0.0, 0
    there = [index for index in sequences if index < len(store.heldout)]
    for start in range(0, len(there), JUDGED_AT_ONCE):
        loss, predicted = engine.evaluate(store.heldout.batch(there[start : start + JUDGED_AT_ONCE]))
        total, tokens = total + loss, tokens + predicted
    return total / tokens
