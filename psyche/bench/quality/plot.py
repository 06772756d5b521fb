"""The curves of the codecs section as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import fmean

from psyche.bench.quality.table import CurveRow


def plot_curves(rows: Sequence[CurveRow], path: Path) -> None:
    """Write a PNG: held-out loss, the mean over seeds, against tokens and against the bytes that a node sent."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)  # Agg and no pyplot: no display, no global state
    by_tokens, by_bytes = figure.subplots(1, 2, sharey=True)
    for axes in (by_tokens, by_bytes):
        axes.set_prop_cycle(color=[colormaps["tab20"](number) for number in range(20)])
    for curve in _curves(rows):
        label = f"{curve[0].codec}, H {curve[0].inner_steps}"
        losses = [point.heldout_loss for point in curve]
        by_tokens.plot([point.tokens for point in curve], losses, label=label)
        by_bytes.plot([point.bytes_sent for point in curve], losses, label=label)
    for axes, what in ((by_tokens, "tokens, all nodes together"), (by_bytes, "bytes sent by a node")):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(places=0))
        axes.set_xlabel(what)
        axes.grid(alpha=0.3)
    by_tokens.set_ylabel("held-out loss, nats a token")
    by_bytes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def _curves(rows: Sequence[CurveRow]) -> list[list[CurveRow]]:
    """One of each setting, in the order of the rows: its points, losses and bytes averaged over the seeds."""
    points: dict[tuple[object, ...], list[CurveRow]] = {}
    for row in rows:
        if not row.final:
            points.setdefault((*row.setting, row.rounds), []).append(row)
    means = [_mean(of_seeds) for of_seeds in points.values()]
    return [list(curve) for _, curve in groupby(means, key=lambda row: row.setting)]


def _mean(rows: Sequence[CurveRow]) -> CurveRow:
    return replace(
        rows[0],
        heldout_loss=fmean(row.heldout_loss for row in rows),
        bytes_sent=fmean(row.bytes_sent for row in rows),
    )
