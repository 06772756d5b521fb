"""Deadlines that follow what was observed (DESIGN §6): never a guess in code."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

WINDOW = 64
"""How many recent observations a deadline rests on."""


def adaptive(observed: Sequence[float], *, spread: float, least: float, most: float, deviation: float = 0.0) -> float:
    """median + ``spread`` × MAD of ``observed`` seconds, within [least, most]; ``most`` before any observation.

    The MAD counts as ``deviation`` of the median at least.
    """
    recent = observed[-WINDOW:]
    if not recent:
        return most
    middle = median(recent)
    mad = max(median(abs(value - middle) for value in recent), deviation * middle)
    return min(max(middle + spread * mad, least), most)
