"""From some measured errors to bounds on all of them, with a stated confidence.

Relative errors of replays spread by a factor, not by a difference, so their logarithms are taken as normal. A bound on
a share of a normal distribution of which only a sample is known is the mean and so many standard deviations of the
sample: a one-sided tolerance limit (Natrella, "Experimental Statistics", NBS Handbook 91, 1963, §2-2; NIST/SEMATECH
e-Handbook, 7.2.6.3). Few samples give wide bounds, and no bound is inside what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, exp, floor, log, log10, sqrt
from statistics import NormalDist, fmean, stdev

CONFIDENCE = 0.95
"""That a bound holds for the share it is for."""
PASSING = 0.99
"""Share of honest replays that are to pass. The others are inconclusive, which costs nobody anything."""
NOT_FAILING = 0.9999
"""Share of honest replays that are not to fail; two more auditors have to find the same before one convicts."""
CAUGHT = 0.99
"""Share of a fraud's replays that are to be above a bound, for the fraud to count as told apart."""
TINY = 1e-3
"""Errors below count as this: by how many powers of ten they are smaller says nothing about the large ones."""
FEWEST = 4
"""Samples without which there is no bound: the formula has none below 3."""


def tolerance_factor(count: int, share: float, confidence: float = CONFIDENCE) -> float:
    """Standard deviations of a sample of ``count``, above whose mean with ``confidence`` no more than 1 − ``share``
    lies."""
    z, c = NormalDist().inv_cdf(share), NormalDist().inv_cdf(confidence)
    a, b = 1 - c * c / (2 * (count - 1)), z * z - c * c / count
    return (z + sqrt(z * z - a * b)) / a


def upper_bound(errors: Sequence[float], share: float) -> float:
    """What ``share`` of such errors are at most; ``FEWEST`` of them or more, or all 0, which bound nothing else."""
    return _bound(errors, share, 1.0)


def lower_bound(errors: Sequence[float], share: float) -> float:
    """What ``share`` of such errors are at least."""
    return _bound(errors, share, -1.0)


def _bound(errors: Sequence[float], share: float, sign: float) -> float:
    if len(errors) < FEWEST:
        raise ValueError(f"{len(errors)} samples, where {FEWEST} are the fewest that bound anything")
    if not any(errors):
        return 0.0
    logs = [log(max(error, TINY)) for error in errors]
    reach = exp(fmean(logs) + sign * tolerance_factor(len(logs), share) * stdev(logs))
    return max(reach, *errors) if sign > 0 else min(reach, *errors)


@dataclass(frozen=True)
class Thresholds:
    """What ``run.audits`` is to say, and what it rests on."""

    pass_error: float
    fail_error: float
    honest: float
    """What all but 1 − ``NOT_FAILING`` of the honest errors are at most, of the pair of kinds that differ most."""
    hostile: Mapping[str, float]
    """What ``CAUGHT`` of the errors of each fraud are at least, by the auditor that sees it worst."""
    missed: tuple[str, ...]
    """Frauds that are not told from honest work: that bound is below ``fail_error``."""


def thresholds(
    honest: Mapping[str, Sequence[float]], hostile: Mapping[str, Sequence[Sequence[float]]], ignored: Sequence[str]
) -> Thresholds:
    """Thresholds for the honest errors of each pair of kinds, and for each fraud's, by auditor.

    Where there is room between honest errors and frauds, but those ``ignored``, ``fail_error`` is in the middle of it
    (in logarithms), and ``pass_error`` half of it or what honest nodes need: kinds of node that were not measured have
    the same room as cheats.
    """
    passing = max(upper_bound(errors, PASSING) for errors in honest.values())
    failing = max(SMALLEST, *(upper_bound(errors, NOT_FAILING) for errors in honest.values()))
    floors = {name: min(lower_bound(errors, CAUGHT) for errors in found) for name, found in hostile.items()}
    least = min(bound for name, bound in floors.items() if name not in ignored)
    room = least > failing
    fail = rounded(sqrt(failing * least) if room else failing, down=room)
    passed = rounded(max(passing, fail / 2)) if passing < fail / 2 else rounded(min(passing, 0.95 * fail), down=True)
    missed = tuple(name for name, bound in floors.items() if bound <= fail)
    return Thresholds(passed, fail, failing, floors, missed)


SMALLEST = 2.0**-23
"""Of an fp32 number's relative rounding: kinds that agree to the bit here may differ by as much elsewhere."""


def rounded(value: float, *, down: bool = False) -> float:
    """To two digits, up; or ``down``."""
    unit = 10.0 ** (floor(log10(value)) - 1)
    digits = floor(value / unit) if down else ceil(value / unit)
    return float(f"{digits * unit:.2g}")
