"""How far DiLoCo is from training on the large batch, and int8 from fp32: measured, with the rival in the same run.

DiLoCo over k nodes is compared with AdamW on a batch k times as large, which is what k data-parallel workers
compute. "The same training" can mean two things, so both are shown (arXiv 2503.09799 on why a comparison must
say which): equal total tokens, and equal steps per node. A third section turns the outer optimizer's knobs.

Training is chaotic: a change of the last bits moves the final loss of a small model by some tenths of a percent.
So int8 is compared with fp32 over pairs of equal seeds, and beside it stands a control, fp32 against itself from
parameters changed by a millionth. What the control shows, too, is not int8's doing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path

from rich.console import Console

from psyche.bench.output import require_folder, write_rows
from psyche.bench.plan import Scale, default_scale, full_scale, items
from psyche.bench.pool import run_all
from psyche.bench.progress import progress
from psyche.bench.table import Row, differences_table, differences_to_fp32, results_table, rows_of, to_json, verdict
from psyche.data.prepare import Report, prepare
from psyche.errors import PsycheError
from psyche.telemetry.wording import amount

WIDTH = 132
"""Columns that the tables need; a narrower terminal wraps lines, which reads better than cells of three letters."""


def main(
    json: Path | None,
    *,
    full: bool = False,
    only: str | None = None,
    preparing: Callable[[], AbstractContextManager[Report | None]] = nullcontext,
) -> None:
    """``psyche bench convergence``: tables to stdout, progress to stderr, rows to ``json`` (a list of flat dicts).

    ``preparing`` shows how the corpus is prepared, which happens once. Raises ``PsycheError``.
    """
    scale = full_scale() if full else default_scale()
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


def measure(scale: Scale, only: str | None = None) -> list[Row]:
    """Run what the table needs, on all cores, and return its rows in its order. The corpus should be prepared.

    ``only`` keeps the rows whose name contains it. Raises :class:`PsycheError` where none does.
    """
    wanted = [item for item in items(scale) if only is None or only in item.name]
    if not wanted:
        names = [item.name for item in items(scale)]
        raise PsycheError(f"no row of the bench has {only!r} in its name; names are like {names[0]} and {names[-1]}")
    trials = {item.trial for item in wanted}
    with progress(trials) as done:
        outcomes = run_all(scale.setting, trials, done)
    return rows_of(wanted, outcomes)


def show(scale: Scale, rows: Sequence[Row], console: Console) -> None:
    """Print the tables of ``rows``, what to know to read them, and what they say about int8."""
    console.print(_preface(scale, rows[0].parameters), highlight=False)
    for comparison, group in groupby(rows, key=lambda row: row.comparison):
        console.print()
        console.print(results_table(comparison, list(group)))
    int8, control = differences_to_fp32(rows, "int8"), differences_to_fp32(rows, "nudged")
    if int8 or control:
        console.print()
        console.print(differences_table([*int8, *control]))
    for differences in filter(None, (int8, control)):
        console.print(verdict(differences), highlight=False)


def _preface(scale: Scale, parameters: int) -> str:
    setting, inner = scale.setting, scale.setting.inner
    return (
        f"{amount(parameters)} parameters; {amount(scale.tokens)} tokens at equal tokens "
        f"({scale.tokens / parameters:.1f} per parameter); a node's batch is {inner.batch_size} sequences of "
        f"{setting.data.sequence_length}; inner lr {inner.lr:g}, {inner.schedule}, warm-up {setting.warmup:.0%}. "
        f"Seeds {', '.join(map(str, scale.seeds))}: mean ± half the range. Loss: nats a token on "
        f"{setting.heldout_sequences} held-out sequences, the same for every row. Bytes per token: sent by a node "
        "(gather; for AdamW a ring all-reduce of fp32 gradients). Tensors are padded to 4096 elements in a payload, "
        "which costs some of its ratio in a model this small."
    )
