"""What only a replay can tell: where parameters stood at a step that no trace point shows.

An auditor that passes everything unseen saves its work, and most of what it passes is honest (the verifier's dilemma:
Luu et al., "Demystifying Incentives in the Consensus Computer", CCS 2015). So a finding carries a few numbers of the
way: how far some parameters have come at steps in the middle of segments. All auditors of a contribution show the same
ones, and of two that passed it unlike numbers are seen (``protocol/judgement.py``).

Steps are drawn between a quarter and half of a segment. There the straight line between its ends, which is what
anybody can guess, is off by .34 to 1.5 of the displacement in the demo's first five rounds, and 11 of 15 such guesses
by more than ``judgement.APART`` allows; fp32 and bf16 differ by .01 to .18, and nodes of one precision by next to
nothing. Who trains only that far saves half of the work, and knows as much.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from psyche.diloco.trace import Point
from psyche.numerics.digest import digest
from psyche.numerics.flat import FlatLayout
from psyche.protocol.assignment import permute
from psyche.protocol.verdicts import MOST, SKETCH

SEGMENTS = 4
"""At most so many of a contribution's segments are looked into."""
UNIT = 1e-9
"""Of a displacement."""


@dataclass(frozen=True)
class Glimpse:
    """What is shown of one segment."""

    step: int
    """Of the round; the displacement is that after it."""
    at: Tensor
    """Positions in the flat vector, ``[k]`` int64."""

    def show(self, before: Tensor, now: Tensor) -> tuple[int, ...]:
        """How far the parameters have come from ``before``, both ``[n]`` fp32, as a finding has it: ``[k]``."""
        moved = (now[self.at].double() - before[self.at].double()) / UNIT
        return tuple(moved.nan_to_num(MOST).clamp(-MOST, MOST).round().long().tolist())


def glimpses(key: bytes, points: Sequence[Point], layout: FlatLayout) -> dict[int, Glimpse]:
    """By the numbers of the segments between ``points``, ascending: ``SKETCH`` parameters in all, or all there are."""
    count = len(points) - 1
    chosen = sorted(_drawn(min(SEGMENTS, count), count, digest("sketched segments", key)))
    found = {}
    for number in chosen:
        own = digest("sketch", key, number.to_bytes(8, "little"))
        start, stop = points[number].step, points[number + 1].step
        first, last = start + (stop - start) // 4, start + (stop - start - 1) // 2
        step = first + int.from_bytes(own[:8], "little") % (max(first, last) - first + 1)
        at = torch.tensor(list(_positions(layout, SKETCH // len(chosen), own)), dtype=torch.int64)
        found[number] = Glimpse(step, at)
    return found


def _positions(layout: FlatLayout, count: int, key: bytes) -> Iterator[int]:
    """Of ``count`` parameters, or of all; padding does not move."""
    spans = layout.spans
    starts = list(accumulate((span.stop - span.start for span in spans), initial=0))
    for number in _drawn(min(count, layout.parameters), layout.parameters, key):
        span = int(np.searchsorted(starts, number, side="right")) - 1
        yield spans[span].start + number - starts[span]


def _drawn(count: int, among: int, key: bytes) -> list[int]:
    """The first ``count`` of ``range(among)`` in an order drawn by ``key``."""
    return permute(np.arange(count, dtype=np.uint64), among, key).tolist() if count else []
