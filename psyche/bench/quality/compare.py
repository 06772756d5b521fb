"""What each codec costs in loss: curves against tokens, rounds and bytes sent, and the losses they end at.

All trials train on the same tokens. A codec has the outer lr, momentum and β that were found best for it
(:mod:`~psyche.bench.quality.plan`), because a setting that is good for one is bad for another by more than codecs
differ. "At equal bytes" compares with int8 where it has sent no more, at whichever H: as one can send less often, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from psyche.bench.output import require_folder, write_rows
from psyche.bench.quality.plan import CodecScale, codec_scale
from psyche.bench.quality.table import CurveRow, codecs_table, curve_rows, summaries, to_json
from psyche.bench.section import Preparing, chosen, outcomes_of, prepare_corpus, wide_console
from psyche.durable import disk_errors
from psyche.telemetry.formatting import amount


def main(
    json: Path | None,
    plot: Path | None = None,
    *,
    full: bool = False,
    only: str | None = None,
    preparing: Preparing = nullcontext,
) -> None:
    """``psyche bench convergence --codecs``: a table to stdout, progress to stderr, the points of all curves to
    ``json`` (a list of flat dicts), a picture of them to ``plot`` (PNG).

    ``preparing`` shows how the corpus is prepared, which happens once. Raises ``PsycheError``.
    """
    scale = codec_scale(full=full)
    require_folder(json)
    require_folder(plot)
    prepare_corpus(scale.setting, preparing)
    rows = measure(scale, only)
    if json is not None:
        write_rows(json, to_json(rows))
    if plot is not None:
        from psyche.bench.quality.plot import plot_curves

        with disk_errors(plot):
            plot_curves(rows, plot)
    show(scale, rows, wide_console())


def measure(scale: CodecScale, only: str | None = None) -> list[CurveRow]:
    """Run the section's trials, on all cores, and return the points of their curves. The corpus should be prepared.

    ``only`` keeps the trials whose label contains it. Raises :class:`PsycheError` where none does.
    """
    trials = chosen(scale.trials(), lambda trial: trial.label, only)
    return curve_rows(scale.setting, trials, outcomes_of(scale.setting, trials))


def show(scale: CodecScale, rows: Sequence[CurveRow], console: Console) -> None:
    """Print the table of ``rows`` and what to know to read it."""
    setting, inner, row = scale.setting, scale.setting.inner, rows[0]
    console.print(
        f"{amount(row.parameters)} parameters, {row.nodes} nodes, {amount(scale.tokens)} tokens "
        f"({scale.tokens / row.parameters:.1f} per parameter); a node's batch is {inner.batch_size} sequences of "
        f"{setting.data.sequence_length}; inner lr {inner.lr:g}, {inner.schedule}, warm-up {setting.warmup:.0%}. "
        f"Seeds {', '.join(map(str, scale.seeds))}: losses ± half their range, against fp32 ± standard error. Loss: "
        f"nats a token on {setting.heldout_sequences} held-out sequences, at equal bytes on {setting.curve_sequences} "
        "of them. Bytes: payloads, from a node to each of the others (gather); tensors are padded to 4096 elements "
        "there, which costs more bits a parameter in a model this small.",
        highlight=False,
    )
    console.print()
    console.print(codecs_table(summaries(rows)))
