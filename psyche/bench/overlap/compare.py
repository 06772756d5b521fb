"""What it costs, or gains, to train on while a round is on the wire (DESIGN §7).

At equal tokens an overlapped run ends sooner than one that waits, so that what it may lose there is the price of that
time. At equal wall time it has taken more steps: the honest question is whether these help. Late steps are taken
before the others' work is known, so in every trial here each node takes all τ of them in each round, which is the most
that a real run would; one with a shorter exchange takes fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path

from rich.console import Console

from psyche.bench.output import require_folder, write_rows
from psyche.bench.overlap.plan import OverlapScale, items, overlap_scale
from psyche.bench.overlap.table import Row, overlap_table, rows_of, to_json
from psyche.bench.pool import run_all
from psyche.bench.progress import progress
from psyche.data.prepare import Report, prepare
from psyche.errors import PsycheError
from psyche.telemetry.wording import amount

WIDTH = 132
"""As the convergence bench's tables."""


def main(
    json: Path | None,
    *,
    full: bool = False,
    only: str | None = None,
    preparing: Callable[[], AbstractContextManager[Report | None]] = nullcontext,
) -> None:
    """``psyche bench convergence --overlap``: tables to stdout, progress to stderr, rows to ``json`` (a list of flat
    dicts).

    ``preparing`` shows how the corpus is prepared, which happens once. Raises ``PsycheError``.
    """
    scale = overlap_scale(full=full)
    require_folder(json)
    with preparing() as report:
        setting = scale.setting
        prepare(setting.data, setting.cache.expanduser(), vocab_limit=setting.model.vocab_size, progress=report)
    rows = measure(scale, only)
    if json is not None:
        write_rows(json, to_json(rows))
    console = Console()
    console.width = max(console.width, WIDTH)
    show(scale, rows, console)


def measure(scale: OverlapScale, only: str | None = None) -> list[Row]:
    """Run the section's trials, on all cores, and return its rows in its order. The corpus should be prepared.

    ``only`` keeps the rows whose name contains it. Raises :class:`PsycheError` where none does.
    """
    wanted = [item for item in items(scale) if only is None or only in item.name]
    if not wanted:
        names = [item.name for item in items(scale)]
        raise PsycheError(f"no row has {only!r} in its name; names are like {names[0]} and {names[-1]}")
    trials = {item.trial for item in wanted}
    with progress(trials) as done:
        outcomes = run_all(scale.setting, trials, done)
    return rows_of(wanted, outcomes)


def show(scale: OverlapScale, rows: Sequence[Row], console: Console) -> None:
    """Print the tables of ``rows`` and what to know to read them."""
    setting, inner, parameters = scale.setting, scale.setting.inner, rows[0].parameters
    console.print(
        f"{amount(parameters)} parameters, {amount(scale.tokens)} tokens at equal tokens "
        f"({scale.tokens / parameters:.1f} per parameter), fp32 payloads; a node's batch is {inner.batch_size} "
        f"sequences of {setting.data.sequence_length}; inner lr {inner.lr:g}, {inner.schedule}, warm-up "
        f"{setting.warmup:.0%}. Seeds {', '.join(map(str, scale.seeds))}: losses ± half their range, differences ± "
        f"standard error. Loss: nats a token on {setting.heldout_sequences} held-out sequences. H is that of each "
        "parameter: a round has H / fragments steps, the first τ of them while the round before it is on the wire. "
        "(nudged): initial parameters changed by a millionth; what that changes is noise.",
        highlight=False,
    )
    for comparison, group in groupby(rows, key=lambda row: row.comparison):
        console.print()
        console.print(overlap_table(comparison, list(group)))
