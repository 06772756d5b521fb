"""Adding up what many nodes sent where some of them lie: the same bits on every node (DESIGN §5, §8).

All of it is done slice by slice, so that a reducer that holds one slice of everybody does what a node that holds all of
them does. ``w`` are the contributions' weights (``protocol/weights.py``), at most 1 together. Less than half, or
``trim``, of *weight* may lie, not of nodes: identities are free, and what all new ones have together is capped.

- ``mean``: Σ w·x. One liar moves it anywhere.
- ``norm_clip``: Σ w·min(1, M/‖x‖)·x, M the weighted lower median of the norms. While less than half of the weight lies,
  M is no more than an honest node's norm, and a liar moves the sum by w·M at most.
- ``trimmed_mean``: of each parameter's values ``trim`` of the weight is left out at either end. Up to so much of it may
  lie, and the result stays between the honest values (Yin et al., arXiv 1803.01498, definition 2, with weights where
  that has counts).
- ``median``: each parameter's weighted median (definition 1 there); less than half may lie.
- ``centered_clip``: v ← v + Σ w·min(1, M/‖x−v‖)·(x−v), a few times (Karimireddy et al., arXiv 2012.10333), from the
  median on; there v begins at the aggregate of the round before, which a node that has just joined does not have. While
  less than half of the weight lies, a step is no longer than M, and a liar's part in it is w·M.

The last three take a value of every parameter from every node. What sparse codecs send is mostly zeros, of which a
median is zero: those are clipped, or just added up.

Only elementwise IEEE operations, one at a time, touch tensors; what is compared and counted is whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import ceil, fsum, sqrt
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["mean", "norm_clip", "trimmed_mean", "median", "centered_clip"]

ITERATIONS = 3
"""Of ``centered_clip``. Each brings v nearer to the mean of those who agree, and gives a liar w·M more. The paper has
1, from where v was in the round before."""
UNIT = 1 << 30
"""Weights are counted in units of 1/UNIT where they are compared: exactly, whatever the order. They fit 32 bits."""
SLACK = 64
"""Units that are cut off besides, with one for each node: liars who have just ``trim`` of the weight, as all newcomers
together may have, are not to have a little more because of how their weights were rounded."""
HALF = Fraction(1, 2)
BLOCK = 1 << 16
"""Parameters sorted at once: a few rows of them stay in a core's cache."""
LEAST = 2.0**-126
"""The least normal fp32. A scaled weight below it has too few bits to bound anything by, and is none: what it belongs
to is about 10³⁷ times as large as the others."""


@dataclass(frozen=True)
class Aggregator:
    """How a run aggregates: ``run.aggregation``, as far as numbers are concerned."""

    kind: Kind
    trim: float = 0.0
    """``trimmed_mean``: the share of weight left out at either end, below one half."""

    @property
    def streams(self) -> bool:
        """Whether one contribution after the other will do, with no more memory than the sum takes."""
        return self.kind in ("mean", "norm_clip")

    def of(self, rows: Tensor, weights: Sequence[float], squared_norms: Sequence[float], out: Tensor) -> None:
        """``out ←`` the aggregate of ``rows`` (fp32 ``[nodes, n]``, in ascending node id), where it does not stream.

        ``weights`` are fp32 values, ``squared_norms`` those of the rows as their codec finds them (fp64).
        """
        _trimmed_mean(rows, weights, Fraction(self.trim) if self.kind == "trimmed_mean" else HALF, out)
        if self.kind == "centered_clip":
            _centered_clip(rows, weights, sqrt(weighted_median(squared_norms, weights)), out)
        if (kept := kept_weight(weights)) < 1.0:
            out.mul_(kept)


def clipped(weights: Sequence[float], squared_norms: Sequence[float]) -> list[float]:
    """``norm_clip`` as weights: fp32 values, each ``w·min(1, M/‖x‖)``, computed in fp64 and rounded once."""
    bound = weighted_median(squared_norms, weights)
    found = []
    for weight, square in zip(weights, squared_norms, strict=True):
        scaled = weight if square <= bound else float(np.float32(weight * sqrt(bound / square)))
        found.append(scaled if scaled >= LEAST or square <= bound else 0.0)
    return found


def weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """The lower weighted median: the least value that, with all below it, has half of the weight or more."""
    total, below = sum(units(weights)), 0
    for value, part in sorted(zip(values, units(weights), strict=True)):
        below += part
        if 2 * below >= total:
            return value
    raise ValueError("a median of nothing")


def units(weights: Sequence[float]) -> list[int]:
    """Weights in whole units. fp32 times a power of two is exact in fp64, so that this rounds once, half to even."""
    return [round(weight * UNIT) for weight in weights]


def kept_weight(weights: Sequence[float]) -> float:
    """What ``weights`` are together, an fp32 value: below 1 where caps leave some to nobody.

    All of it otherwise: their rounding can make a difference of 2⁻²⁴ together, which is nobody's doing.
    """
    together = fsum(weights)  # exact, then rounded once: the order does not matter
    return 1.0 if together >= 1 - 2.0**-23 else float(np.float32(together))


# --------------------------------------------------------------------------- coordinate by coordinate


def _trimmed_mean(rows: Tensor, weights: Sequence[float], trim: Fraction, out: Tensor) -> None:
    """``out ←`` of each column of ``rows`` the mean of what is left when ``trim`` of the weight is cut off either end.

    At one half that is the median: the middle value, or the mean of two where half of the weight lies on either side.
    A value that a cut goes through counts in part. Sums are of fp64 values, from the least up, and rounded once.
    """
    parts = units(weights)
    middle = (sum(parts) - 1) // 2  # that one unit is left, or two
    first = min(ceil(trim * sum(parts)) + len(parts) + SLACK, middle)
    last = sum(parts) - first
    for start in range(0, rows.shape[1], BLOCK):
        ordered = _sorted([row[start : start + BLOCK] for row in rows], parts)
        mean = torch.zeros_like(ordered[0], dtype=torch.float64)
        reach, before = torch.zeros_like(ordered[0]), torch.full_like(ordered[0], first)
        for key in ordered:
            value, part = _value_and_units(key)
            level = reach.add_(part).clamp(first, last)
            mean.add_(value.mul_(level - before))
            before = level
        out[start : start + BLOCK].copy_(mean.div_(last - first))


def _sorted(values: Sequence[Tensor], parts: Sequence[int]) -> list[Tensor]:
    """At each position the values in ascending order, and the units of the one each came from: as int64 ``[n]`` keys.

    A value is the upper half of a key, its units are the lower, so that to sort is to take minima and maxima of whole
    numbers, elementwise: the same everywhere, and three times as fast as ``torch.sort`` of columns of 4, 8 or 32.
    """
    keys = [_key(value, part) for value, part in zip(values, parts, strict=True)]
    for i, j in network(len(keys)):
        keys[i], keys[j] = torch.minimum(keys[i], keys[j]), torch.maximum(keys[i], keys[j], out=keys[j])
    return keys


def _key(value: Tensor, part: int) -> Tensor:
    """int64 ``[n]`` that sorts as fp32 ``value`` does, then by ``part`` units."""
    pattern = value.view(torch.int32)
    ascending = pattern ^ ((pattern >> 31) & 0x7FFFFFFF)
    return (ascending.to(torch.int64) << 32).add_(part)


def _value_and_units(key: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`_key`: fp64 and int64, ``[n]``."""
    ascending = (key >> 32).to(torch.int32)
    value = (ascending ^ ((ascending >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return value.double(), key & 0xFFFFFFFF


@cache
def network(count: int) -> tuple[tuple[int, int], ...]:
    """Which two to compare and swap, one after the other, to sort ``count`` values: odd-even merges (Batcher, 1968;
    Knuth, TAOCP 3, algorithm 5.2.2M)."""
    return tuple(_comparators(count))


def _comparators(count: int) -> Iterator[tuple[int, int]]:
    top = 1 << max(0, (count - 1).bit_length() - 1)
    p = top if count > 1 else 0
    while p > 0:
        q, r, d = top, 0, p
        while True:
            yield from ((i, i + d) for i in range(count - d) if i & p == r)
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2


# ------------------------------------------------------------------------------------- centered clip


def _centered_clip(rows: Tensor, weights: Sequence[float], radius: float, out: Tensor) -> None:
    """From the median in ``out``; in fp64, rounded once. A convex combination at every step: it cannot overflow."""
    centre, total = out.double(), fsum(weights)
    for _ in range(ITERATIONS):
        move = torch.zeros_like(centre)
        for row, weight in zip(rows, weights, strict=True):
            away = row.double().sub_(centre)
            distance = sqrt(tree_sum(away * away))
            share = weight / total
            move.add_(away.mul_(share if distance <= radius else share * (radius / distance)))
        centre.add_(move)
    out.copy_(centre)


def tree_sum(values: Tensor) -> float:
    """Σ of fp64 ``[n]``, by adding the second half to the first until one is left; ``values`` is undefined then.

    A reduction by the hardware's own order would not be the same everywhere.
    """
    count = values.numel()
    while count > 1:
        half = (count + 1) // 2
        values[: count - half].add_(values[half:count])
        count = half
    return float(values[0]) if count else 0.0
