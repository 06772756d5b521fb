"""From ``psyche join`` to the first inner step, on shaped links, beside what importing and the line take at least.

Every process is the ordinary command, in a network namespace behind a link of its own. Only the time of an inner step
is made: see :mod:`psyche.bench.utilisation.paced`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from psyche.bench.exchange.links import congestion_control
from psyche.bench.exchange.reap import ended_politely
from psyche.bench.join.plan import Plan, Trial, trial
from psyche.bench.join.run import run
from psyche.bench.join.table import Row, row_of, table, to_json
from psyche.bench.output import require_folder, write_rows
from psyche.bench.section import wide_console
from psyche.telemetry.formatting import amount, size


def main(json: Path | None, plan: Plan) -> None:
    """``psyche bench join``: a table to stdout, progress to stderr, rows to ``json``. Raises ``PsycheError``."""
    require_folder(json)
    planned = trial(plan)
    with ended_politely():
        rows = measure(planned)
    if json is not None:
        write_rows(json, to_json(rows))
    show(planned, rows, wide_console())


def measure(planned: Trial) -> list[Row]:
    """Play the run with all its newcomers. Raises :class:`PsycheError`."""
    with tempfile.TemporaryDirectory(prefix="psyche-bench-") as folder:
        joined, donors = run(planned, Path(folder), _say)
        return [row_of(planned, one, donors) for one in joined]


def show(planned: Trial, rows: Sequence[Row], console: Console) -> None:
    """Print the table and what to know to read it."""
    plan = planned.plan
    console.print(
        f"{plan.peers} donors, {amount(planned.parameters)} parameters, {plan.codec}, links of {plan.rate / 1e6:.3g} "
        f"Mbit/s (TCP {congestion_control()}); a state of {size(planned.state_bytes)}, which takes "
        f"{planned.line_seconds:.1f} s of the line.\nA step lasts "
        f"{1e3 * plan.step_seconds:g} ms, mostly slept, as while a GPU works. Seconds count from the start of the "
        "newcomer's process; its first step may be one of warming up.\n",
        highlight=False,
        markup=False,
    )
    console.print(table(rows))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
