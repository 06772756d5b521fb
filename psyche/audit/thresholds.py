"""Derive audit thresholds from measured replay errors, with a stated confidence.

Honest replay errors follow no convenient distribution: most are zero, and where training amplifies rounding some are a
thousand times larger. The bound is therefore distribution-free: with confidence c, the largest of n samples exceeds a
share (1 − c)^(1/n) of the population (Wilks 1941, "Determination of sample sizes for setting tolerance limits";
NIST/SEMATECH e-Handbook, 7.2.6.4). A margin is added on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10, sqrt
from statistics import median

CONFIDENCE = 0.95
"""Confidence of the tolerance bound."""
MARGIN = 4.0
"""``fail_error`` is at least this multiple of the largest honest error."""
FEWEST = 4
"""Fewest segments that thresholds are derived from."""
SEEN = 0.5
"""Share of a fraud's replays that must fail for it to count as detected: on average by the second audit."""
SMALLEST = 2.0**-23
"""Relative rounding error of fp32: kinds that agree bit for bit here may differ by this much elsewhere."""


@dataclass(frozen=True)
class Thresholds:
    """Values for ``run.audits``, and the measurements behind them."""

    pass_error: float
    fail_error: float
    honest: float
    """The largest error between honest nodes, over all pairs of kinds."""
    share: float
    """Share of all honest replays with at most that error: a lower bound with ``CONFIDENCE``."""
    hostile: Mapping[str, float]
    """Share of each fraud's replays that fail, for the kind of auditor that detects the fewest."""
    missed: tuple[str, ...]
    """Frauds that are not detected: their share is below ``SEEN``."""


def covered(count: int, confidence: float = CONFIDENCE) -> float:
    """Return the share of the population that the largest of ``count`` samples exceeds, with ``confidence``."""
    return float((1 - confidence) ** (1 / count))


def thresholds(
    honest: Mapping[str, Sequence[float]], hostile: Mapping[str, Sequence[Sequence[float]]], ignored: Sequence[str]
) -> Thresholds:
    """Derive thresholds from ``honest`` errors by pair of kinds, and ``hostile`` errors by fraud and auditor.

    ``fail_error`` is ``MARGIN`` times the largest honest error, or the geometric mean of that error and the median
    error of the smallest fraud that is not ``ignored``, if that is larger: kinds of node that were not measured then
    get as much room as frauds. ``pass_error`` is half of it. Raises ``ValueError`` for fewer than ``FEWEST`` segments.
    """
    count = min(map(len, honest.values()))
    if count < FEWEST:
        raise ValueError(f"{count} segments measured, but thresholds need at least {FEWEST}: measure more rounds")
    largest = max(SMALLEST, *(error for errors in honest.values() for error in errors))
    usual = min(median(errors) for name, found in hostile.items() if name not in ignored for errors in found)
    fail = rounded(max(MARGIN * largest, sqrt(largest * usual)))
    caught = {
        name: min(sum(error >= fail for error in errors) / len(errors) for errors in found)
        for name, found in hostile.items()
    }
    missed = tuple(name for name, share in caught.items() if share < SEEN)
    return Thresholds(rounded(fail / 2, down=True), fail, largest, covered(count), caught, missed)


def rounded(value: float, *, down: bool = False) -> float:
    """Round to two significant digits, up or ``down``."""
    unit = 10.0 ** (floor(log10(value)) - 1)
    digits = floor(value / unit) if down else ceil(value / unit)
    return float(f"{digits * unit:.2g}")
