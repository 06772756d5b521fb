"""A calibration for people: a table, a picture, and what to write into the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from psyche.audit.calibration import FRAUDS, ONE_STEP, ReplayErrors
from psyche.audit.thresholds import CONFIDENCE, MARGIN, Thresholds

IGNORED = (ONE_STEP,)
"""Frauds that thresholds are not set for: what they save is less than audits cost. Shown all the same."""


def table(measured: ReplayErrors) -> Table:
    """Return a table of relative errors, claims by auditors."""
    found = Table(title="Relative error of a replay", title_justify="left", title_style="bold", header_style="dim")
    found.add_column("claimed")
    for kind in measured.kinds:
        found.add_column(f"audited by\n{kind}", justify="right")
    for claim in (*measured.kinds, *FRAUDS):
        cells = [_range(measured.errors.get((claim, kind), ())) for kind in measured.kinds]
        found.add_row(claim, *cells, end_section=claim == measured.kinds[-1])
    return found


def _range(errors: Sequence[float]) -> str:
    return f"{min(errors):.2g} – {max(errors):.2g}" if errors else "–"


def words(measured: ReplayErrors, found: Thresholds) -> str:
    """Return what the thresholds rest on, and what they do not tell apart."""
    lines = [
        f"{len(measured.segments)} segments. Honest nodes are at most {found.honest:.2g} apart; with {CONFIDENCE:.0%} "
        f"confidence {found.share:.0%} or more of all replays are (free of distribution: more rounds, more of them).",
        f"What fails is {found.fail_error / found.honest:.2g} times as far off. Of the replays of a fraud that are:",
        *(f"  {name:18} {share:.0%}{_mark(name, found)}" for name, share in found.hostile.items()),
    ]
    if set(found.missed) - set(IGNORED):
        lines.append("Honest noise and frauds overlap: run.audits.trace_steps, which makes segments shorter, helps.")
    return "\n".join(lines)


def _mark(name: str, found: Thresholds) -> str:
    return "   not told from honest work" if name in found.missed else ""


def snippet(found: Thresholds) -> str:
    """For the configuration, YAML."""
    return f"run:\n  audits: {{pass_error: {found.pass_error:g}, fail_error: {found.fail_error:g}}}"


def to_json(measured: ReplayErrors, found: Thresholds) -> dict[str, Any]:
    """Return every error, and the thresholds."""
    rows = [
        {"claimed": claim, "audited_by": kind, "honest": claim in measured.kinds, "errors": errors}
        for (claim, kind), errors in measured.errors.items()
    ]
    return {
        "segments": [{"round": one.round + 1, "start": one.start, "stop": one.stop} for one in measured.segments],
        "confidence": CONFIDENCE,
        "margin": MARGIN,
        "pass_error": found.pass_error,
        "fail_error": found.fail_error,
        "honest_most": found.honest,
        "honest_share": found.share,
        "hostile_caught": dict(found.hostile),
        "not_told_apart": list(found.missed),
        "errors": rows,
    }


def plot(measured: ReplayErrors, found: Thresholds, title: str, path: Path) -> None:
    """Draw every error on one logarithmic axis, a line for each pair of kinds and each fraud, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [(f"{name.replace(' | ', ', by ')}", [errors], "#0b6bcb") for name, errors in measured.honest.items()]
    lines += [(name, list(errors), "#c2410c") for name, errors in measured.hostile.items()]
    figure = Figure(figsize=(8.4, 1.4 + 0.27 * len(lines)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)  # Agg and no pyplot: no display, no global state
    axes = figure.add_subplot()
    for number, (_, groups, color) in enumerate(lines):
        errors = [max(error, SHOWN_FROM) for group in groups for error in group]
        axes.plot(errors, [number] * len(errors), "o", color=color, markersize=3.5, alpha=0.6, clip_on=False)
    for value, name in ((found.pass_error, "pass"), (found.fail_error, "fail")):
        axes.axvline(value, color="#52606d", linewidth=1, linestyle="--" if name == "pass" else "-")
        axes.text(value, -1.1, f"{name} {value:g}", fontsize=7, ha="right" if name == "pass" else "left")
    axes.set_xscale("log")
    axes.set_yticks(range(len(lines)), [name for name, _, _ in lines], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"relative error of a replay (errors below {SHOWN_FROM:g} are drawn there)")
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10, pad=14)
    figure.savefig(path, format="png")


SHOWN_FROM = 1e-8
