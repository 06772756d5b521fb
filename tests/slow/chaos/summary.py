"""A readable summary of a chaos run."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, isfinite
from statistics import median

from tests.slow.chaos.fault_injector import AppliedFault, FaultInjector
from tests.slow.chaos.faults import KINDS
from tests.slow.chaos.observer import Observations
from tests.slow.chaos.replay import Losses

EXPLANATION = """\
run: seconds from the fault until any process certifies the next round; earlier faults may still have an effect.
itself: seconds until the affected process completes a round with the others, from the end of the fault (for a clock,
from the fault; for a join, from its start). Other faults may have hit it meanwhile; a node that left for good before it
recovered is not counted."""


def table(injector: FaultInjector, seen: Observations, coordinators: Iterable[str]) -> str:
    """Format the number of faults of each kind and the median and maximum recovery times."""
    lines = [f"{'':<12}{'faults':>7}{'run: median':>13}{'max':>7}{'itself: median':>16}{'max':>7}"]
    for kind in KINDS:
        done = [one for one in injector.done if one.fault.kind == kind]
        run = [_since(one.began, seen.next_after(one.began)) for one in done]
        own = [
            took
            for one in done
            if one.fault.kind != "partition" and one.fault.target not in coordinators
            if isfinite(took := _own(one, seen)) or one.fault.target not in injector.left
        ]
        lines.append(f"{kind:<12}{len(done):>7}{_median(run):>13}{_most(run):>7}{_median(own):>16}{_most(own):>7}")
    return "\n".join([*lines, EXPLANATION])


def leaving(injector: FaultInjector) -> str:
    """Format how long leaving took."""
    took = injector.leaving_seconds
    return f"Ctrl-C to exit: {_median(took)} s, at most {_most(took)} s ({len(took)} times)"


def endings(injector: FaultInjector) -> str:
    """Format which processes exited on their own, with their last line of output."""
    told = [f"{one.name} exited on its own ({one.code}): {one.last_line}" for one in injector.ended]
    return "\n".join(told or ["no process exited on its own"])


def losses(found: Losses) -> str:
    """Format the run's loss beside those of undisturbed runs and of reordered data."""
    reordered = ", ".join(f"{loss:.4f} ({loss / found.undisturbed - 1:+.2%})" for loss in found.reordered)
    return (
        f"held-out loss {found.before:.4f} -> {found.after:.4f}; undisturbed, on the same tokens: "
        f"{found.undisturbed:.4f} ({found.after / found.undisturbed - 1:+.2%}); with reordered data: {reordered}"
    )


def _own(one: AppliedFault, seen: Observations) -> float:
    start = one.began if one.fault.kind in ("clock", "join") else one.undone
    return _since(start, seen.next_after(start, one.fault.target))


def _since(start: float, end: float | None) -> float:
    return inf if end is None else end - start


def _median(values: list[float]) -> str:
    return _formatted(median(values)) if values else "-"


def _most(values: list[float]) -> str:
    return _formatted(max(values)) if values else "-"


def _formatted(seconds: float) -> str:
    return f"{seconds:.1f}" if isfinite(seconds) else "never"
