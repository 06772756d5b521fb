"""Ways that take turns, so that other load on the machine affects all of them, and the statistics of their results."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from statistics import fmean, median, stdev
from typing import TypeVar

from psyche.errors import PsycheError

W = TypeVar("W")
T = TypeVar("T")


def in_turn(ways: Sequence[W], repeat: int) -> list[W]:
    """Return every way once. Another way comes first in each repeat."""
    first = repeat % len(ways)
    return [*ways[first:], *ways[:first]]


def take_turns(
    ways: Sequence[W],
    repeats: range,
    run: Callable[[W, int], T],
    failed: Callable[[W, PsycheError], None] | None = None,
) -> dict[W, list[T]]:
    """Run every way once in each repeat, and return each way's results. Negative repeats warm up and are not returned.

    ``failed`` is told of a way that raises :class:`PsycheError`, which is then left out; it may raise the error again.
    """
    found: dict[W, list[T]] = {way: [] for way in ways}
    for repeat in repeats:
        for way in in_turn(ways, repeat):
            if way not in found:
                continue
            try:
                result = run(way, repeat)
            except PsycheError as error:
                if failed is None:
                    raise
                failed(way, error)
                del found[way]
                continue
            if repeat >= 0:
                found[way].append(result)
    return found


def median_of(values: Iterable[float]) -> float:
    """Median of any iterable."""
    return median(list(values))


def percent_above(value: float, reference: float) -> float:
    """By how many percent of ``reference`` the ``value`` is above it."""
    return 100 * (value / reference - 1)


def spread(form: str) -> Callable[[Sequence[float]], str]:
    """Return a fold: the mean ± half the range. A single value is shown alone."""

    def fold(values: Sequence[float]) -> str:
        mean = format(fmean(values), form)
        return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:{form.lstrip('+')}}"

    return fold


def with_error(values: Sequence[float]) -> str:
    """Return a fold: the mean ± its standard error. A dash where all values are 0, which is the reference itself."""
    if not any(values):
        return "–"
    mean = f"{fmean(values):+.2f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values) / sqrt(len(values)):.2f}"


def busy_note() -> list[str]:
    """A sentence if the machine is busy now; else nothing."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores / 2:
        return []
    return [f"the machine was busy at the start (load average {load:.1f} on {cores} cores): speeds are unreliable"]


def say(line: str) -> None:
    """Print a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)
