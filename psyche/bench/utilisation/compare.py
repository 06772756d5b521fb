"""The share of its time that a node trains, with and without overlap, where exchanging takes long.

Every run is a real one: coordinator and nodes are the ordinary commands, each in a network namespace behind a link
of its own. Only the time of an inner step is made: see :mod:`psyche.bench.utilisation.paced`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console

from psyche.bench.exchange.links import congestion_control
from psyche.bench.exchange.reap import ended_politely
from psyche.bench.output import require_folder, write_rows
from psyche.bench.section import wide_console
from psyche.bench.utilisation.plan import SKIPPED, Plan, Trial, trials
from psyche.bench.utilisation.run import run
from psyche.bench.utilisation.table import Row, rows_of, table, to_json
from psyche.telemetry.formatting import amount


def main(json: Path | None, plan: Plan) -> None:
    """``psyche bench utilisation``: a table to stdout, progress to stderr, rows to ``json``. Raises ``PsycheError``."""
    require_folder(json)
    planned = trials(plan)
    with ended_politely():
        rows = measure(planned)
    if json is not None:
        write_rows(json, to_json(rows))
    show(plan, planned, rows, wide_console())


def measure(planned: Sequence[Trial]) -> list[Row]:
    """Run them one after another. Raises :class:`PsycheError`."""
    rows: list[Row] = []
    for trial in planned:
        with tempfile.TemporaryDirectory(prefix="psyche-bench-") as folder:
            coordinator, nodes = run(trial, Path(folder))
            found = rows_of(trial, coordinator, nodes)
        typical = median(row.utilisation for row in found)
        print(f"{trial.way:10} {100 * typical:.1f} % of the time in inner steps", file=sys.stderr, flush=True)
        rows += found
    return rows


def show(plan: Plan, planned: Sequence[Trial], rows: Sequence[Row], console: Console) -> None:
    """Print the table and what to know to read it."""
    first = planned[0]
    console.print(
        f"{plan.peers} nodes, {amount(first.parameters)} parameters, {first.config.run.codec.name}, links of "
        f"{first.rate / 1e6:.3g} Mbit/s (TCP {congestion_control()}): the bytes alone take {100 * plan.ratio:.0f} % of "
        f"a round's computing.\nA step lasts {1e3 * plan.step_seconds:g} ms, mostly slept, as while a GPU works. The "
        f"first {SKIPPED} rounds are not counted, nor the last.\n",
        highlight=False,
        markup=False,
    )
    console.print(table(rows))
