"""Compare what each codec costs in loss: curves against tokens, rounds and bytes sent, and the final losses.

All trials train on the same tokens. Each codec has the outer lr, momentum and β that were found best for it
(:data:`CHOICES`), because a setting that suits one codec costs another more than codecs differ. "At equal bytes"
compares with int8 when it had sent no more bytes, at any H: sending less often is the alternative to a smaller codec.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Annotated

import msgspec
from rich.console import Console

from psyche.bench.convergence.large_batch import default_section
from psyche.bench.convergence.loss_curve import Point
from psyche.bench.convergence.section import Item, Outcomes, Preparing, Section
from psyche.bench.convergence.trial import Outcome, Setting, Trial
from psyche.bench.harness.rows import Column, Row, require_folder, run_bench, table
from psyche.bench.harness.turns import percent_above, spread, with_error
from psyche.config import Outer
from psyche.durable import disk_errors
from psyche.numerics.codecs.registry import CODECS
from psyche.telemetry.formatting import size

REFERENCE, BASELINE = "fp32", "int8"
"""Codecs to which losses are compared at equal tokens, and at equal bytes."""


@dataclass(frozen=True)
class Choice:
    """The settings of one codec at one H."""

    codec: str
    inner_steps: int
    lr: float
    """Outer learning rate."""
    momentum: float
    error_feedback: float | None = None
    """β. ``None``: the codec's usual one, or it has none."""


CHOICES = (
    # Best of seven at 10 tokens a parameter, H = 10 and one seed (lr .5 to 1, momentum .5 to .8): 0.5 with 0.7 is 0.2 %
    # worse, the others 0.5 to 1.7 %. The dense codecs lose so little that they share it.
    Choice("fp32", 10, lr=0.7, momentum=0.7),
    Choice("int8", 10, lr=0.7, momentum=0.7),
    Choice("int4", 10, lr=0.7, momentum=0.7),
    Choice("int4-32", 10, lr=0.7, momentum=0.7),
    Choice("int2", 10, lr=0.7, momentum=0.7),
    Choice("topk2-256", 5, lr=1.4, momentum=0.3, error_feedback=0.95),
    # What decays in the error feedback before its turn comes is made up for by an outer lr far above 1. At H = 10 and
    # 10 tokens a parameter: 3.147 with lr 2 and momentum .3; 3.159 with 2.8 and 0; 3.176 with 1.4 and .5; 3.256 with 1
    # and .5; 3.315 with .7 and .7. β: 3.147 with .95, 3.179 with .9, 3.189 with .98, 3.248 with 1. With more rounds in
    # as many steps the best β is nearer to 1.
    Choice("topk2", 10, lr=2.0, momentum=0.3, error_feedback=0.95),
    Choice("topk2", 5, lr=2.0, momentum=0.3, error_feedback=0.98),
    Choice("topk2", 2, lr=2.0, momentum=0.3, error_feedback=0.99),
    # Dense codecs with as few bytes, by sending less often: int8 with H 20 and 40 beside int4 and int2, int2 with 20
    # beside topk2-256, the others beside topk2. Not searched for, but lr 1 and momentum .5 are 0.1 % worse than .7 and
    # .7 for int2 with 40.
    Choice("int2", 20, lr=0.7, momentum=0.7),
    Choice("int8", 20, lr=0.7, momentum=0.7),
    Choice("int8", 40, lr=0.7, momentum=0.7),
    Choice("int8", 136, lr=1.0, momentum=0.5),
    Choice("int8", 544, lr=1.0, momentum=0.3),
)
"""The loss depends more on these than on the codec. Losses in the comments are of one seed, where differences below
half a percent may be noise. With all tokens ten runs of dense codecs with H = 10 ended at 2.870, with a standard
deviation of .010, and three of topk2 with H = 2 at 2.893."""


class CurveRow(Row, frozen=True):
    """One trial after a round."""

    name: str
    """Name of the trial. Its rows are neighbours; the last one is final."""
    codec: Annotated[str, Column("codec", left=True)]
    """``topk2e`` rows are ``topk2`` trials with entropy-coded payloads: the coder is lossless."""
    nodes: int
    outer_lr: Annotated[float, Column("outer\nlr", "g")]
    momentum: Annotated[float, Column("momentum", "g")]
    error_feedback: Annotated[float | None, Column("β", "g")]
    """β. ``None`` for lossless codecs."""
    inner_steps: Annotated[int, Column("H")]
    """H."""
    seed: int
    parameters: int
    rounds: Annotated[int, Column("rounds")]
    tokens: int
    """Tokens that all nodes together have trained on."""
    bytes_sent: Annotated[float, Column("sent\n/node", fold=lambda values: size(fmean(values)))]
    """Bytes that a node has sent to all others together, mean over nodes."""
    bits_per_parameter: Annotated[float, Column("bits/\nparam", fold=lambda values: f"{fmean(values):.3g}")]
    """Bits of a payload per parameter, mean so far."""
    heldout_loss: Annotated[float, Column("held-out loss", fold=spread(".4f"))]
    """Nats per token, of the outer parameters."""
    heldout_sequences: int
    """Sequences on which the loss was measured: more for the final row."""
    final: bool

    @property
    def bytes_per_token(
        self,
    ) -> Annotated[float, Column("bytes\n/token", fold=lambda values: f"{fmean(values):,.2f}", after="bytes_sent")]:
        """Bytes that a node sends for each token it trains on."""
        return self.bytes_sent * self.nodes / self.tokens

    @property
    def setting(self) -> tuple[object, ...]:
        """Everything that makes the row but its seed."""
        return (self.codec, self.outer_lr, self.momentum, self.error_feedback, self.inner_steps)


class FinalRow(CurveRow, frozen=True):
    """A final row, compared with fp32 and int8 of the same seed. For the table only."""

    against_fp32: Annotated[float | None, Column("vs fp32 %", fold=with_error)]
    """Final loss against fp32's, in %; positive is worse."""
    baseline: Annotated[float | None, Column("int8 with\nthese bytes", fold=spread(".3f"))]
    """Lowest loss that int8 reaches with no more bytes at any H, on the sequences of the curve."""
    against_baseline: Annotated[float | None, Column("vs that\n%", fold=lambda values: f"{fmean(values):+.1f}")]
    """The loss on those sequences against ``baseline``, in %; negative is better."""


@dataclass(frozen=True)
class CodecLoss(Section[CurveRow]):
    """``psyche bench convergence --codecs``."""

    steps: int
    """Inner steps of each of ``CENTRE`` nodes."""
    seeds: tuple[int, ...]
    choices: tuple[Choice, ...]

    def items(self) -> Iterator[Item]:
        for choice in self.choices:
            for seed in self.seeds:
                outer = Outer(lr=choice.lr, momentum=choice.momentum)
                trial = Trial(steps=self.steps, codec=choice.codec, outer=outer, inner_steps=choice.inner_steps)
                yield Item(replace(trial, error_feedback=choice.error_feedback, seed=seed))

    def rows(self, items: Sequence[Item], outcomes: Outcomes) -> list[CurveRow]:
        """Return the curve and the final loss of every trial; sparse trials once more as entropy-coded."""
        found: list[CurveRow] = []
        for trial in (item.trial for item in items):
            outcome = outcomes[trial]
            last = replace(outcome.curve[-1], heldout_loss=outcome.heldout_loss)
            rows = [_row(self.setting, trial, outcome, point, False) for point in outcome.curve]
            rows.append(_row(self.setting, trial, outcome, last, True))
            found += rows
            if last.entropy_coded_bytes is not None:
                found += _entropy_coded(rows, (*outcome.curve, last))
        return found

    def main(
        self,
        json: Path | None,
        *,
        only: str | None = None,
        preparing: Preparing = nullcontext,
        plot: Path | None = None,
    ) -> None:
        """Run the section as the others, and draw the curves to ``plot``, a PNG file. Raises ``PsycheError``."""

        def show(rows: Sequence[CurveRow], console: Console) -> None:
            if plot is not None:
                with disk_errors(plot):
                    plot_curves(rows, plot)
            self.show(rows, console)

        require_folder(plot)
        run_bench(json, lambda: self.prepare_and_measure(only, preparing), list, show)

    def show(self, rows: Sequence[CurveRow], console: Console) -> None:
        details = (
            f"At equal bytes: on {self.setting.curve_sequences} of them. vs fp32: ± standard error. Bytes: payloads "
            "from a node to each of the others (gather), where tensors are padded to 4096 elements, which costs more "
            "bits per parameter in so small a model."
        )
        console.print(self.preface(rows[0].parameters, self.steps, self.seeds, details), highlight=False)
        title = "Codecs: held-out loss at equal tokens, and against int8 at equal bytes"
        console.print(table(title, final_rows(rows), group=lambda row: row.setting))


def _row(setting: Setting, trial: Trial, outcome: Outcome, point: Point, final: bool) -> CurveRow:
    beta = CODECS[trial.codec].error_feedback if trial.error_feedback is None else trial.error_feedback
    return CurveRow.of(
        point,
        trial,
        outcome,
        name=trial.label,
        error_feedback=None if trial.codec == REFERENCE else beta,
        bits_per_parameter=8 * point.bytes_sent / (trial.nodes - 1) / point.rounds / outcome.parameters,
        heldout_sequences=setting.heldout_sequences if final else setting.curve_sequences,
        final=final,
    )


def _entropy_coded(rows: Iterable[CurveRow], points: Iterable[Point]) -> Iterator[CurveRow]:
    for row, point in zip(rows, points, strict=True):
        assert point.entropy_coded_bytes is not None
        yield msgspec.structs.replace(
            row,
            name=row.name.replace("topk2", "topk2e"),
            codec=row.codec.replace("topk2", "topk2e"),
            bytes_sent=point.entropy_coded_bytes,
            bits_per_parameter=row.bits_per_parameter * point.entropy_coded_bytes / row.bytes_sent,
        )


# ----------------------------------------------------------------------------------------- for people


def final_rows(rows: Sequence[CurveRow]) -> list[FinalRow]:
    """Return the final row of every trial, seeds of one setting as neighbours. fp32 is compared with at its first
    setting."""
    by_setting: dict[tuple[object, ...], list[CurveRow]] = {}
    for row in rows:
        by_setting.setdefault(row.setting, []).append(row)
    fp32 = next((found for found in by_setting.values() if found[0].codec == REFERENCE), [])
    reference = {row.seed: row.heldout_loss for row in fp32 if row.final}
    baseline = [row for row in rows if row.codec == BASELINE and not row.final]
    return [
        _final(list(of_seed), reference, baseline)
        for found in by_setting.values()
        for _, of_seed in groupby(found, key=lambda row: row.seed)
    ]


def _final(rows: Sequence[CurveRow], fp32: Mapping[int, float], baseline: Sequence[CurveRow]) -> FinalRow:
    *_, last, final = rows
    within = [r.heldout_loss for r in baseline if r.seed == last.seed and r.bytes_sent <= last.bytes_sent]
    lowest = min(within, default=None)
    return FinalRow.of(
        final,
        against_fp32=percent_above(final.heldout_loss, fp32[final.seed]) if final.seed in fp32 else None,
        baseline=lowest,
        against_baseline=None if lowest is None else percent_above(last.heldout_loss, lowest),
    )


def plot_curves(rows: Sequence[CurveRow], path: Path) -> None:
    """Write a PNG: held-out loss, mean over seeds, against tokens and against the bytes that a node sent."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)  # Agg without pyplot: no display, no global state
    by_tokens, by_bytes = figure.subplots(1, 2, sharey=True)
    for axes in (by_tokens, by_bytes):
        axes.set_prop_cycle(color=[colormaps["tab20"](number) for number in range(20)])
    for curve in _mean_curves(rows):
        label = f"{curve[0].codec}, H {curve[0].inner_steps}"
        losses = [point.heldout_loss for point in curve]
        by_tokens.plot([point.tokens for point in curve], losses, label=label)
        by_bytes.plot([point.bytes_sent for point in curve], losses, label=label)
    for axes, what in ((by_tokens, "tokens, all nodes together"), (by_bytes, "bytes sent by a node")):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(places=0))
        axes.set_xlabel(what)
        axes.grid(alpha=0.3)
    by_tokens.set_ylabel("held-out loss, nats per token")
    by_bytes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def _mean_curves(rows: Sequence[CurveRow]) -> list[list[CurveRow]]:
    """One curve for each setting: losses and bytes averaged over the seeds."""
    points: dict[tuple[object, ...], list[CurveRow]] = {}
    for row in rows:
        if not row.final:
            points.setdefault((*row.setting, row.rounds), []).append(row)
    means = [
        msgspec.structs.replace(
            of_seeds[0],
            heldout_loss=fmean(row.heldout_loss for row in of_seeds),
            bytes_sent=fmean(row.bytes_sent for row in of_seeds),
        )
        for of_seeds in points.values()
    ]
    return [list(curve) for _, curve in groupby(means, key=lambda row: row.setting)]


def codec_section(cache: Path | None = None, *, full: bool = False) -> CodecLoss:
    """Return the section with the model and tokens of the full default section, and two seeds; ``full``: three."""
    base = default_section(cache, full=True)
    return CodecLoss(
        setting=replace(base.setting, curve_points=24),
        steps=base.steps,
        seeds=base.seeds if full else base.seeds[:2],
        choices=CHOICES,
    )
