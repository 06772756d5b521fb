"""Nodes of different speeds in one run: whether all end together, and how much of its time each is idle.

The run is a real one, of the ordinary commands on the loopback interface. Only the time of an inner step is made: see
:mod:`psyche.bench.utilisation.paced`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from psyche.bench.exchange.links import on_loopback
from psyche.bench.exchange.reap import ended_politely
from psyche.bench.mixed.plan import SKIPPED, Plan
from psyche.bench.mixed.table import Found, found_in, table, to_json
from psyche.bench.output import require_folder, write_rows
from psyche.bench.section import wide_console
from psyche.bench.utilisation.run import run_at


def main(json: Path | None, plan: Plan) -> None:
    """``psyche bench mixed``: a table to stdout, progress to stderr, rows to ``json``. Raises ``PsycheError``."""
    require_folder(json)
    with ended_politely():
        found = measure(plan)
    if json is not None:
        write_rows(json, to_json(found.rows))
    show(plan, found, wide_console())


def measure(plan: Plan) -> Found:
    """Run it. Raises :class:`PsycheError`."""
    with tempfile.TemporaryDirectory(prefix="psyche-bench-") as folder:
        places = on_loopback(len(plan.speeds) + 1)
        return found_in(plan, *run_at(places, plan.config, plan.steps_take, Path(folder)))


def show(plan: Plan, found: Found, console: Console) -> None:
    """Print the table and what to know to read it."""
    console.print(
        f"{len(plan.speeds)} nodes, H {plan.inner_steps}. The first {SKIPPED} rounds are not counted. From a round's "
        f"plan to its last commitment {found.training:.2f} s, {100 * found.over:+.1f} % of the {found.ideal:.2f} s "
        f"that H steps take the fastest; with equal quotas it would be the slowest's {found.equal:.2f} s.\n",
        highlight=False,
    )
    console.print(table(found.rows))
