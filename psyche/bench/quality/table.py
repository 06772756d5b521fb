"""The rows of the codecs section, one for each point of a curve, and the table made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

from psyche.bench.curves import Point
from psyche.bench.quality.plan import BASELINE, REFERENCE
from psyche.bench.table import percent, spread
from psyche.bench.trials import Outcome, Setting, Trial
from psyche.numerics.codecs.registry import CODECS
from psyche.telemetry.formatting import number, size


@dataclass(frozen=True)
class CurveRow:
    """One trial after some round; a flat dict of JSON has these fields."""

    name: str
    """Of the trial; its rows follow each other, and the last one is final."""
    codec: str
    """``topk2e`` rows are ``topk2`` trials whose payloads were entropy-coded, too: it loses nothing."""
    nodes: int
    outer_lr: float
    momentum: float
    error_feedback: float | None
    """β; None for codecs that lose nothing."""
    inner_steps: int
    """H."""
    seed: int
    parameters: int
    rounds: int
    tokens: int
    """All nodes together."""
    bytes_sent: float
    """By a node to all others together, the mean over nodes."""
    bits_per_parameter: float
    """Of a payload, the mean so far."""
    heldout_loss: float
    """Nats a token, of the outer parameters."""
    heldout_sequences: int
    """On how many the loss was measured: more for the final row."""
    final: bool

    @property
    def bytes_per_token(self) -> float:
        """Sent by a node for each token it trains on."""
        return self.bytes_sent * self.nodes / self.tokens

    @property
    def setting(self) -> tuple[Any, ...]:
        """All that makes the row but its seed."""
        return (self.codec, self.outer_lr, self.momentum, self.error_feedback, self.inner_steps)


def curve_rows(setting: Setting, trials: Iterable[Trial], outcomes: Mapping[Trial, Outcome]) -> list[CurveRow]:
    """The curve and the final loss of every trial, in their order; sparse trials once more as entropy-coded."""
    found: list[CurveRow] = []
    for trial in trials:
        outcome = outcomes[trial]
        last = replace(outcome.curve[-1], heldout_loss=outcome.heldout_loss)
        rows = [_row(setting, trial, outcome, point, False) for point in outcome.curve]
        rows.append(_row(setting, trial, outcome, last, True))
        found += rows
        if last.entropy_coded_bytes is not None:
            found += _entropy_coded(rows, (*outcome.curve, last))
    return found


def _row(setting: Setting, trial: Trial, outcome: Outcome, point: Point, final: bool) -> CurveRow:
    assert trial.outer is not None, "curves are DiLoCo's"
    assert trial.inner_steps is not None, "curves are DiLoCo's"
    beta = CODECS[trial.codec].error_feedback if trial.error_feedback is None else trial.error_feedback
    return CurveRow(
        name=trial.label,
        codec=trial.codec,
        nodes=trial.nodes,
        outer_lr=trial.outer.lr,
        momentum=trial.outer.momentum,
        error_feedback=None if trial.codec == REFERENCE else beta,
        inner_steps=trial.inner_steps,
        seed=trial.seed,
        parameters=outcome.parameters,
        rounds=point.rounds,
        tokens=point.tokens,
        bytes_sent=point.bytes_sent,
        bits_per_parameter=8 * point.bytes_sent / (trial.nodes - 1) / point.rounds / outcome.parameters,
        heldout_loss=point.heldout_loss,
        heldout_sequences=setting.heldout_sequences if final else setting.curve_sequences,
        final=final,
    )


def _entropy_coded(rows: Iterable[CurveRow], points: Iterable[Point]) -> Iterator[CurveRow]:
    for row, point in zip(rows, points, strict=True):
        assert point.entropy_coded_bytes is not None
        yield replace(
            row,
            name=row.name.replace("topk2", "topk2e"),
            codec=row.codec.replace("topk2", "topk2e"),
            bytes_sent=point.entropy_coded_bytes,
            bits_per_parameter=row.bits_per_parameter * point.entropy_coded_bytes / row.bytes_sent,
        )


# ----------------------------------------------------------------------------------------- for people


@dataclass(frozen=True)
class Summary:
    """The seeds of one codec at one setting, compared with fp32 and int8 of the same seeds."""

    finals: tuple[CurveRow, ...]
    against_fp32: tuple[float, ...]
    """In %, seed by seed; positive is worse."""
    baseline: tuple[float, ...]
    """What int8 reaches with no more bytes and tokens, at whichever H was measured; on the sequences of the curve."""
    against_baseline: tuple[float, ...]
    """The loss, on those sequences, against that: in %, negative is better."""


def summaries(rows: Sequence[CurveRow]) -> list[Summary]:
    """One for each setting, in the order of the rows. fp32 is its first setting there is."""
    by_setting: dict[tuple[Any, ...], list[CurveRow]] = {}
    for row in rows:
        by_setting.setdefault(row.setting, []).append(row)
    fp32 = next((found for found in by_setting.values() if found[0].codec == REFERENCE), [])
    reference = {row.seed: row.heldout_loss for row in fp32 if row.final}
    baseline = [row for row in rows if row.codec == BASELINE and not row.final]
    return [_summary(found, reference, baseline) for found in by_setting.values()]


def _summary(rows: Sequence[CurveRow], fp32: Mapping[int, float], baseline: Sequence[CurveRow]) -> Summary:
    finals = tuple(row for row in rows if row.final)
    affordable, against = [], []
    for _, of_seed in groupby(rows, key=lambda row: row.seed):
        last = [row for row in of_seed if not row.final][-1]
        within = [r.heldout_loss for r in baseline if r.seed == last.seed and r.bytes_sent <= last.bytes_sent]
        if within:
            affordable.append(min(within))
            against.append(percent(last.heldout_loss, min(within)))
    return Summary(
        finals,
        tuple(percent(row.heldout_loss, fp32[row.seed]) for row in finals if row.seed in fp32),
        tuple(affordable),
        tuple(against),
    )


def codecs_table(found: Iterable[Summary]) -> Table:
    """:func:`summaries` for people."""
    title = "Codecs: held-out loss at equal tokens, and against int8 at equal bytes"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    table.add_column("codec")
    headings = ["outer\nlr", "momentum", "β", "H", "rounds", "bits/\nparam", "sent\n/node", "bytes\n/token"]
    for heading in [*headings, "held-out loss", "vs fp32 %", "int8 with\nthese bytes", "vs that\n%"]:
        table.add_column(heading, justify="right")
    for one in found:
        row = one.finals[0]
        table.add_row(
            row.codec,
            f"{row.outer_lr:g}",
            f"{row.momentum:g}",
            number(row.error_feedback, "g"),
            str(row.inner_steps),
            str(row.rounds),
            f"{fmean(r.bits_per_parameter for r in one.finals):.3g}",
            size(fmean(r.bytes_sent for r in one.finals)),
            f"{fmean(r.bytes_per_token for r in one.finals):,.2f}",
            spread([r.heldout_loss for r in one.finals], ".4f"),
            _with_error(one.against_fp32),
            spread(one.baseline, ".3f") if one.baseline else "–",
            f"{fmean(one.against_baseline):+.1f}" if one.baseline else "–",
        )
    return table


def _with_error(values: Sequence[float]) -> str:
    """Mean ± its standard error."""
    if not values:
        return "–"
    mean = f"{fmean(values):+.2f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values) / sqrt(len(values)):.2f}"


def to_json(rows: Iterable[CurveRow]) -> list[dict[str, Any]]:
    """A list of flat dicts."""
    return [asdict(row) for row in rows]
