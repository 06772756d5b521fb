"""From some measured errors of replays to thresholds, with a stated confidence.

Errors of honest replays have no shape that could be counted on: most are nothing, and where training enlarges rounding
some are a thousand times the others. So what is said of those that were not measured is free of any distribution: with
confidence c, the largest of n samples is above a share (1 − c)^(1/n) of all there are (Wilks 1941, "Determination of
sample sizes for setting tolerance limits"; NIST/SEMATECH e-Handbook, 7.2.6.4). Beyond it there is a margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10, sqrt
from statistics import median

CONFIDENCE = 0.95
"""That the share is at least so large."""
MARGIN = 4.0
"""How many times the largest honest error the least is that fails; half of that passes."""
FEWEST = 4
"""Segments without which nothing is said."""
SEEN = 0.5
"""Share of a fraud's replays that have to fail for it to count as told apart: it is found out by the second audit."""
SMALLEST = 2.0**-23
"""Of an fp32 number's relative rounding: kinds that agree to the bit here may differ by as much elsewhere."""


@dataclass(frozen=True)
class Thresholds:
    """What ``run.audits`` is to say, and what it rests on."""

    pass_error: float
    fail_error: float
    honest: float
    """The largest error between honest nodes, of the pair of kinds that differ most."""
    share: float
    """Of honest replays that are at most so far apart, at least, with ``CONFIDENCE``."""
    hostile: Mapping[str, float]
    """Share of the replays of each fraud that fail, by the auditor that sees the fewest."""
    missed: tuple[str, ...]
    """Frauds that are not told from honest work: fewer than ``SEEN`` do."""


def covered(count: int, confidence: float = CONFIDENCE) -> float:
    """Share of all that is at most the largest of ``count`` samples, at least, with ``confidence``."""
    return float((1 - confidence) ** (1 / count))


def thresholds(
    honest: Mapping[str, Sequence[float]], hostile: Mapping[str, Sequence[Sequence[float]]], ignored: Sequence[str]
) -> Thresholds:
    """Thresholds for the honest errors of each pair of kinds, and for each fraud's, by auditor.

    ``fail_error`` is ``MARGIN`` times the largest honest error, or more where there is room: in the middle (in
    logarithms) between that and a usual error of the smallest fraud that is not ``ignored``. Kinds of node that were
    not measured have as much room then as cheats. ``pass_error`` is half of it.
    """
    count = min(map(len, honest.values()))
    if count < FEWEST:
        raise ValueError(f"{count} segments, where {FEWEST} are the fewest that say anything")
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
    """To two digits, up; or ``down``."""
    unit = 10.0 ** (floor(log10(value)) - 1)
    digits = floor(value / unit) if down else ceil(value / unit)
    return float(f"{digits * unit:.2g}")
