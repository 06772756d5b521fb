"""The rows of the overlap section, and the tables made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

from psyche.bench.overlap.plan import Comparison, Item
from psyche.bench.table import percent, spread
from psyche.bench.trials import Outcome, Trial
from psyche.telemetry.formatting import amount


@dataclass(frozen=True)
class Row:
    """One trial in one comparison; a flat dict of JSON has these fields."""

    name: str
    comparison: Comparison
    inner_steps: int
    """H: of each parameter; a round has ``inner_steps / fragments`` of them."""
    fragments: int
    overlap_steps: int
    """τ, in each round."""
    share: float
    """τ over a round's steps: the length of an exchange for which training need not wait."""
    alpha: float | None
    """Late steps are mixed with this factor; None where they are kept by re-basing, or where there are none."""
    outer_lr: float
    momentum: float
    seed: int
    nudge: float
    """Relative change of the initial parameters; not 0 in the control."""
    rounds: int
    tokens: int
    """All nodes together."""
    steps_per_node: int
    parameters: int
    bytes_per_token: float
    heldout_loss: float
    """Nats a token, of the outer parameters."""
    against_waiting_percent: float | None
    """100 × (loss / loss of the same seed where training waits − 1); positive is worse. None where ``--only`` left that
    one out."""
    seconds: float
    """Of the trial alone, on one core that others may share."""

    @property
    def merge(self) -> str:
        """What becomes of late steps, in words."""
        if not self.overlap_steps:
            return "–"
        return "re-based" if self.alpha is None else f"mixed, α {self.alpha:g}"


def rows_of(items: Iterable[Item], outcomes: Mapping[Trial, Outcome]) -> list[Row]:
    """The row of every item, in their order. ``outcomes`` holds their trials; references may be missing."""
    return [_row(item, outcomes[item.trial], outcomes.get(item.reference)) for item in items]


def _row(item: Item, outcome: Outcome, reference: Outcome | None) -> Row:
    trial, way = item.trial, item.way
    assert trial.outer is not None, "all trials of the section are DiLoCo's"
    return Row(
        name=item.name,
        comparison=item.comparison,
        inner_steps=way.inner_steps,
        fragments=way.fragments,
        overlap_steps=way.late,
        share=float(way.share),
        alpha=way.mix,
        outer_lr=trial.outer.lr,
        momentum=trial.outer.momentum,
        seed=trial.seed,
        nudge=trial.nudge,
        rounds=trial.steps * way.fragments // way.inner_steps,
        tokens=outcome.tokens,
        steps_per_node=trial.steps,
        parameters=outcome.parameters,
        bytes_per_token=outcome.bytes_per_token,
        heldout_loss=outcome.heldout_loss,
        against_waiting_percent=percent(outcome.heldout_loss, reference.heldout_loss) if reference else None,
        seconds=round(outcome.seconds, 1),
    )


_TITLES: dict[Comparison, str] = {
    "equal tokens": "(a) Equal tokens: as many inner steps, whether training waits for exchanges or not",
    "equal wall time": "(b) Equal wall time: steps are taken while the first of (a) waits",
}


def overlap_table(comparison: Comparison, rows: Sequence[Row]) -> Table:
    """The rows of one comparison, seeds folded into mean ± half their range; differences into mean ± standard error."""
    table = Table(title=_TITLES[comparison], title_justify="left", title_style="bold", header_style="dim")
    headings = ["H", "frag-\nments", "τ", "τ / round", "late steps", "outer\nlr", "momentum", "rounds", "tokens"]
    for heading in [*headings, "bytes\n/token", "held-out loss", "vs waiting %"]:
        table.add_column(heading, justify="right")
    for _, seeds in groupby(rows, key=_setting):
        table.add_row(*_cells(list(seeds)))
    return table


def _setting(row: Row) -> tuple[Any, ...]:
    way = (row.inner_steps, row.fragments, row.overlap_steps, row.alpha, row.outer_lr, row.momentum)
    return (*way, row.steps_per_node, row.nudge)


def _cells(seeds: Sequence[Row]) -> list[str]:
    row = seeds[0]
    against = [one.against_waiting_percent for one in seeds if one.against_waiting_percent is not None]
    return [
        str(row.inner_steps),
        str(row.fragments),
        str(row.overlap_steps),
        f"{row.share:.0%}" if row.overlap_steps else "waits",
        "(nudged)" if row.nudge else row.merge,
        f"{row.outer_lr:g}",
        f"{row.momentum:g}",
        str(row.rounds),
        amount(row.tokens),
        f"{row.bytes_per_token:,.1f}",
        spread([one.heldout_loss for one in seeds], ".4f"),
        with_error(against),
    ]


def with_error(values: Sequence[float]) -> str:
    """Mean ± its standard error; a dash where there is nothing to compare with, or where it is the reference itself."""
    if not any(values):
        return "–"
    mean = f"{fmean(values):+.2f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values) / sqrt(len(values)):.2f}"


def to_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A list of flat dicts."""
    return [asdict(row) for row in rows]
