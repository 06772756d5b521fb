"""What a story of faults came to, for people to read."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, isfinite
from statistics import median

from tests.slow.chaos.conductor import Conductor, Done
from tests.slow.chaos.faults import KINDS
from tests.slow.chaos.replay import Losses
from tests.slow.chaos.watch import Seen

EXPLANATION = """\
run: seconds from the fault until the next round is certified, by anybody; earlier faults may still be felt.
itself: until the process that it happened to has gone through a round with the others, from when it was undone; for a
clock from the fault, for a join from its start. Something else may have happened to it meanwhile; who left for good
before it was back is not counted."""


def table(conductor: Conductor, seen: Seen, coordinators: Iterable[str]) -> str:
    """Faults by kind and how long it took to recover from them, median and maximum."""
    lines = [f"{'':<12}{'faults':>7}{'run: median':>13}{'max':>7}{'itself: median':>16}{'max':>7}"]
    for kind in KINDS:
        done = [one for one in conductor.done if one.fault.kind == kind]
        run = [_since(one.began, seen.next_after(one.began)) for one in done]
        own = [
            took
            for one in done
            if one.fault.kind != "partition" and one.fault.target not in coordinators
            if isfinite(took := _own(one, seen)) or one.fault.target not in conductor.left
        ]
        lines.append(f"{kind:<12}{len(done):>7}{_median(run):>13}{_most(run):>7}{_median(own):>16}{_most(own):>7}")
    return "\n".join([*lines, EXPLANATION])


def leaving(conductor: Conductor) -> str:
    """How long it took to leave."""
    took = conductor.leaving_seconds
    return f"Ctrl-C to exit: {_median(took)} s, at most {_most(took)} s ({len(took)} times)"


def endings(conductor: Conductor) -> str:
    """Who ended by itself, and what it said."""
    told = [f"{one.name} ended by itself ({one.code}): {one.said}" for one in conductor.ended]
    return "\n".join(told or ["nobody ended by itself"])


def losses(found: Losses) -> str:
    """The run's loss beside that of an undisturbed one, and what is noise."""
    dealt = ", ".join(f"{loss:.4f} ({loss / found.undisturbed - 1:+.2%})" for loss in found.dealt)
    return (
        f"held-out loss {found.before:.4f} -> {found.after:.4f}; undisturbed, from the same tokens: "
        f"{found.undisturbed:.4f} ({found.after / found.undisturbed - 1:+.2%}); when they are dealt otherwise: {dealt}"
    )


def _own(one: Done, seen: Seen) -> float:
    start = one.began if one.fault.kind in ("clock", "join") else one.undone
    return _since(start, seen.next_after(start, one.fault.target))


def _since(start: float, end: float | None) -> float:
    return inf if end is None else end - start


def _median(values: list[float]) -> str:
    return _shown(median(values)) if values else "-"


def _most(values: list[float]) -> str:
    return _shown(max(values)) if values else "-"


def _shown(seconds: float) -> str:
    return f"{seconds:.1f}" if isfinite(seconds) else "never"
