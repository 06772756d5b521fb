"""Tokens a second of a node in a run, of its engine, of a plain PyTorch loop and of ``transformers.Trainer``.

Ways take turns in every repeat, each in a process of its own, and are compared within it: the ratio that counts is
the median of the repeats' ratios.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

import msgspec
from rich.console import Console
from rich.table import Table

from psyche.bench.engine.plan import WAYS, Plan, Way, order
from psyche.bench.engine.run import seconds_per_step
from psyche.bench.exchange.reap import ended_politely
from psyche.bench.output import require_folder, write_rows
from psyche.bench.section import Preparing, wide_console
from psyche.config import Run
from psyche.data.prepare import prepare
from psyche.telemetry.formatting import amount
from psyche.training.models import layout


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One way in one repeat; a flat dict of JSON has these fields."""

    way: Way
    repeat: int
    step_seconds: float
    tokens_per_second: float
    against_loop: float
    """Tokens a second over those of the plain loop in the same repeat."""


def main(json: Path | None, plan: Plan, preparing: Preparing) -> None:
    """``psyche bench engine``: a table to stdout, progress to stderr, rows to ``json``. Raises ``PsycheError``."""
    require_folder(json)
    config = plan.load()
    with preparing() as report:
        prepare(
            config.run.data, config.node.cache.expanduser(), vocab_limit=config.run.model.vocab_size, progress=report
        )
    with ended_politely():
        rows = measure(plan, config.run, available())
    if json is not None:
        write_rows(json, [msgspec.to_builtins(row) for row in rows])
    show(plan, config.run, rows, wide_console())


def available() -> tuple[Way, ...]:
    """The ways that work here: the Trainer needs accelerate."""
    if importlib.util.find_spec("accelerate") is not None:
        return WAYS
    print("transformers.Trainer is left out: it needs accelerate (make bench-engine installs it)", file=sys.stderr)
    return tuple(way for way in WAYS if way != "trainer")


def measure(plan: Plan, run: Run, ways: Sequence[Way]) -> list[Row]:
    """Every way in every repeat, in turns. Raises :class:`PsycheError`."""
    rows = []
    for repeat in range(plan.repeats):
        seconds: dict[Way, float] = {}
        for way in order(repeat):
            if way in ways:
                seconds[way] = seconds_per_step(plan, way)
                rate = run.tokens_per_step / seconds[way]
                print(f"{repeat + 1}/{plan.repeats} {way:8} {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
        rows += [
            Row(
                way=way,
                repeat=repeat,
                step_seconds=seconds[way],
                tokens_per_second=run.tokens_per_step / seconds[way],
                against_loop=seconds["loop"] / seconds[way],
            )
            for way in ways
        ]
    return rows


_WHAT: dict[Way, str] = {
    "loop": "plain PyTorch loop",
    "trainer": "transformers.Trainer",
    "engine": "psyche's engine alone",
    "node": "psyche node in a run",
}


def show(plan: Plan, run: Run, rows: Sequence[Row], console: Console) -> None:
    """Print the table and what to know to read it."""
    parameters = layout(run.model).parameters
    console.print(
        f"{amount(parameters)} parameters, batches of {run.inner.batch_size} × {run.data.sequence_length} tokens, "
        f"{plan.device}, {plan.threads} threads, {plan.steps} steps in each of {plan.repeats} repeats. A node's rate "
        "is that of its inner steps; what a round takes besides is for psyche bench utilisation.",
        highlight=False,
    )
    console.print(table(rows))


def table(rows: Sequence[Row]) -> Table:
    """One line a way: medians over the repeats, and the range of the ratio."""
    shown = Table(title="Tokens a second", title_justify="left", title_style="bold", header_style="dim")
    shown.add_column("way")
    for heading in ("ms a step", "tokens/s", "of the loop", "least", "most"):
        shown.add_column(heading, justify="right")
    for way in dict.fromkeys(row.way for row in rows):
        own = [row for row in rows if row.way == way]
        ratios = [row.against_loop for row in own]
        shown.add_row(
            _WHAT[way],
            f"{1e3 * _median(row.step_seconds for row in own):.1f}",
            f"{_median(row.tokens_per_second for row in own):,.0f}",
            *(f"{100 * one:.1f} %" for one in (median(ratios), min(ratios), max(ratios))),
        )
    return shown


def _median(values: Iterable[float]) -> float:
    return median(list(values))
