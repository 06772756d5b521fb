"""Deadlines that adapt to what was observed, within the bounds of the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

WINDOW = 64
"""How many recent observations a deadline rests on."""
SPREAD = 5.0
"""How many MADs above the median a deadline lies. For normally distributed times (MAD = 0.67 σ) this is 3.4 σ: the
deadline cuts off one honest node in 2,700."""


def adaptive(observed: Sequence[float], *, least: float, most: float, deviation: float = 0.0) -> float:
    """median + ``SPREAD`` × MAD of ``observed`` seconds, within [least, most]; ``most`` before any observation.

    The MAD counts as ``deviation`` of the median at least.
    """
    recent = observed[-WINDOW:]
    if not recent:
        return most
    middle = median(recent)
    mad = max(median(abs(value - middle) for value in recent), deviation * middle)
    return min(max(middle + SPREAD * mad, least), most)
