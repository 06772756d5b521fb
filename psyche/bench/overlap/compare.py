"""What it costs, or gains, to train on while a round is on the wire (DESIGN §7).

At equal tokens an overlapped run ends sooner than one that waits, so that what it may lose there is the price of that
time. At equal wall time it has taken more steps: the honest question is whether these help. Late steps are taken
before the others' work is known, so in every trial here each node takes all τ of them in each round, which is the most
that a real run would; one with a shorter exchange takes fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path

from rich.console import Console

from psyche.bench.output import require_folder, write_rows
from psyche.bench.overlap.plan import OverlapScale, items, overlap_scale
from psyche.bench.overlap.table import Row, overlap_table, rows_of, to_json
from psyche.bench.section import Preparing, chosen, outcomes_of, prepare_corpus, wide_console
from psyche.telemetry.formatting import amount


def main(
    json: Path | None,
    *,
    full: bool = False,
    only: str | None = None,
    preparing: Preparing = nullcontext,
) -> None:
    """``psyche bench convergence --overlap``: tables to stdout, progress to stderr, rows to ``json`` (a list of flat
    dicts).

    ``preparing`` shows how the corpus is prepared, which happens once. Raises ``PsycheError``.
    """
    scale = overlap_scale(full=full)
    require_folder(json)
    prepare_corpus(scale.setting, preparing)
    rows = measure(scale, only)
    if json is not None:
        write_rows(json, to_json(rows))
    show(scale, rows, wide_console())


def measure(scale: OverlapScale, only: str | None = None) -> list[Row]:
    """Run the section's trials, on all cores, and return its rows in its order. The corpus should be prepared.

    ``only`` keeps the rows whose name contains it. Raises :class:`PsycheError` where none does.
    """
    wanted = chosen(items(scale), lambda item: item.name, only)
    return rows_of(wanted, outcomes_of(scale.setting, (item.trial for item in wanted)))


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
