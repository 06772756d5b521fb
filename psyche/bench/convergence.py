"""How far DiLoCo is from training on the large batch, and int8 from fp32: measured, with the rival in the same run.

DiLoCo over k nodes is compared with AdamW on a batch k times as large, which is what k data-parallel workers
compute. "The same training" can mean two things, so both are shown (arXiv 2503.09799 on why a comparison must
say which): equal total tokens, and equal steps per node. A third section turns the outer optimizer's knobs.

Training is chaotic: a change of the last bits moves the final loss of a small model by some tenths of a percent.
So int8 is compared with fp32 over pairs of equal seeds, and beside it stands a control, fp32 against itself from
parameters changed by a millionth. What the control shows, too, is not int8's doing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path

from rich.console import Console

from psyche.bench.output import require_folder, write_rows
from psyche.bench.plan import Scale, default_scale, full_scale, items
from psyche.bench.section import Preparing, chosen, outcomes_of, prepare_corpus, wide_console
from psyche.bench.table import Row, differences_table, differences_to_fp32, results_table, rows_of, to_json, verdict
from psyche.telemetry.formatting import amount


def main(
    json: Path | None,
    *,
    full: bool = False,
    only: str | None = None,
    preparing: Preparing = nullcontext,
) -> None:
    """``psyche bench convergence``: tables to stdout, progress to stderr, rows to ``json`` (a list of flat dicts).

    ``preparing`` shows how the corpus is prepared, which happens once. Raises ``PsycheError``.
    """
    scale = full_scale() if full else default_scale()
    require_folder(json)
    prepare_corpus(scale.setting, preparing)
    rows = measure(scale, only)
    if json is not None:
        write_rows(json, to_json(rows))
    show(scale, rows, wide_console())


def measure(scale: Scale, only: str | None = None) -> list[Row]:
    """Run what the table needs, on all cores, and return its rows in its order. The corpus should be prepared.

    ``only`` keeps the rows whose name contains it. Raises :class:`PsycheError` where none does.
    """
    wanted = chosen(items(scale), lambda item: item.name, only)
    return rows_of(wanted, outcomes_of(scale.setting, (item.trial for item in wanted)))


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
