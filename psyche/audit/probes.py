"""Probes: parameters at steps that no trace point reveals, which only a node that replays can measure.

An auditor that passes everything without replaying saves its work, and is mostly right (the verifier's dilemma: Luu et
al., "Demystifying Incentives in the Consensus Computer", CCS 2015). So a finding carries a sketch: the displacement of
a few parameters at steps in the middle of segments. All auditors of a contribution measure the same probes, and two who
passed it with different sketches are detected (``protocol/audit_outcome.py``).

Steps are drawn between a quarter and half of a segment. There the straight line between the segment's ends, which
anybody can interpolate, is off by 0.34 to 1.5 of the displacement in the demo's first five rounds; 11 of 15 such
guesses exceed ``judgement.APART``. fp32 and bf16 differ by 0.01 to 0.18, nodes of one precision hardly at
all. An auditor that trains only up to the probe saves half of the work and knows the sketch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from psyche.diloco.trace import TracePoint
from psyche.numerics.digest import digest
from psyche.numerics.flat import FlatLayout
from psyche.protocol.assignment import permute
from psyche.protocol.audit_messages import MOST, SKETCH

MAX_SEGMENTS = 4
"""Segments of a contribution that get a probe, at most."""
UNIT = 1e-9
"""Unit of a displacement in a sketch."""


@dataclass(frozen=True)
class Probe:
    """Where one segment is measured."""

    step: int
    """Inner step of the round after which the displacement is taken."""
    positions: Tensor
    """Positions in the flat vector, ``[k]`` int64."""

    def measure(self, before: Tensor, now: Tensor) -> tuple[int, ...]:
        """Return the ``k`` displacements from ``before`` to ``now``, both ``[n]`` fp32, in ``UNIT``."""
        moved = (now[self.positions].double() - before[self.positions].double()) / UNIT
        return tuple(moved.nan_to_num(MOST).clamp(-MOST, MOST).round().long().tolist())


def draw_probes(key: bytes, points: Sequence[TracePoint], layout: FlatLayout) -> dict[int, Probe]:
    """Draw probes by ``key``: up to ``SKETCH`` parameters in all. Returned by segment number, ascending."""
    count = len(points) - 1
    chosen = sorted(_draw(min(MAX_SEGMENTS, count), count, digest("sketched segments", key)))
    found = {}
    for number in chosen:
        own = digest("sketch", key, number.to_bytes(8, "little"))
        start, stop = points[number].step, points[number + 1].step
        first, last = start + (stop - start) // 4, start + (stop - start - 1) // 2
        step = first + int.from_bytes(own[:8], "little") % (max(first, last) - first + 1)
        positions = torch.tensor(list(_positions(layout, SKETCH // len(chosen), own)), dtype=torch.int64)
        found[number] = Probe(step, positions)
    return found


def _positions(layout: FlatLayout, count: int, key: bytes) -> Iterator[int]:
    """Draw the positions of ``count`` parameters, or of all if there are fewer. Padding is never drawn."""
    spans = layout.spans
    starts = list(accumulate((span.stop - span.start for span in spans), initial=0))
    for number in _draw(min(count, layout.parameters), layout.parameters, key):
        span = int(np.searchsorted(starts, number, side="right")) - 1
        yield spans[span].start + number - starts[span]


def _draw(count: int, among: int, key: bytes) -> list[int]:
    """Return the first ``count`` elements of ``range(among)`` in an order drawn by ``key``."""
    return permute(np.arange(count, dtype=np.uint64), among, key).tolist() if count else []
