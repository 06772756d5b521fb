"""What it costs in loss that nodes take different numbers of inner steps, at equal tokens and equal rounds.

Nodes of speeds 1:2:4 are compared with as many equal ones that together are as fast: both do the same in a round, in
the same time, and send the same. Quotas are what the protocol gives such nodes, and weights follow tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from psyche.bench.output import require_folder, write_rows
from psyche.bench.overlap.table import with_error
from psyche.bench.plan import NUDGE, default_scale
from psyche.bench.section import Preparing, outcomes_of, prepare_corpus, wide_console
from psyche.bench.table import percent, spread
from psyche.bench.trials import Outcome, Setting, Trial
from psyche.config import Outer
from psyche.telemetry.formatting import amount


@dataclass(frozen=True)
class Scale:
    """One size of the comparison."""

    setting: Setting
    outer: Outer
    mixed: tuple[int, ...]
    """Inner steps a round of each node."""
    equal: int
    """Of each of as many equal nodes."""
    rounds: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One trial; a flat dict of JSON has these fields."""

    name: str
    due: str
    """Inner steps a round of each node."""
    nudge: float
    """Relative change of the initial parameters; not 0 in the control."""
    seed: int
    rounds: int
    tokens: int
    heldout_loss: float
    """Nats a token, of the outer parameters."""
    against_equal_percent: float | None
    """100 × (loss / loss of equal nodes at the same seed − 1); positive is worse."""
    seconds: float


def loss_scale(cache: Path | None = None) -> Scale:
    """The small model of the convergence bench, at its outer optimizer; H is 24 for the fastest."""
    scale = default_scale(cache)
    return Scale(scale.setting, scale.outer, mixed=(6, 12, 24), equal=14, rounds=100, seeds=(0, 1, 2))


def main(json: Path | None, *, preparing: Preparing = nullcontext) -> None:
    """``psyche bench mixed --loss``: a table to stdout, progress to stderr, rows to ``json``.

    Raises ``PsycheError``.
    """
    scale = loss_scale()
    require_folder(json)
    prepare_corpus(scale.setting, preparing)
    wanted = list(trials(scale))
    rows = rows_of(scale, wanted, outcomes_of(scale.setting, wanted))
    if json is not None:
        write_rows(json, to_json(rows))
    show(scale, rows, wide_console())


def trials(scale: Scale) -> Iterator[Trial]:
    """Equal nodes, the same from nudged parameters (what that changes is noise), and mixed ones; for every seed."""
    for nudge in (0.0, NUDGE):
        yield from (replace(equal(scale, seed), nudge=nudge) for seed in scale.seeds)
    for seed in scale.seeds:
        most = max(scale.mixed)
        yield replace(equal(scale, seed), due=scale.mixed, inner_steps=most, steps=most * scale.rounds)


def equal(scale: Scale, seed: int) -> Trial:
    """What a trial of that seed is measured against."""
    return Trial(
        system="diloco",
        codec="fp32",  # a codec's own loss would hide the smaller one that is looked for here
        nodes=len(scale.mixed),
        steps=scale.equal * scale.rounds,
        outer=scale.outer,
        inner_steps=scale.equal,
        seed=seed,
    )


def rows_of(scale: Scale, wanted: Iterable[Trial], outcomes: Mapping[Trial, Outcome]) -> list[Row]:
    """A row for each trial; the one it is measured against may be missing."""
    rows = []
    for trial in wanted:
        outcome, reference = outcomes[trial], outcomes.get(equal(scale, trial.seed))
        rows.append(
            Row(
                name=trial.label,
                due=":".join(map(str, trial.due or [scale.equal] * trial.nodes)),
                nudge=trial.nudge,
                seed=trial.seed,
                rounds=scale.rounds,
                tokens=outcome.tokens,
                heldout_loss=outcome.heldout_loss,
                against_equal_percent=percent(outcome.heldout_loss, reference.heldout_loss) if reference else None,
                seconds=round(outcome.seconds, 1),
            )
        )
    return rows


def to_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A list of flat dicts."""
    return [asdict(row) for row in rows]


def show(scale: Scale, rows: Sequence[Row], console: Console) -> None:
    """Print the table, seeds folded into mean ± half their range and differences into mean ± standard error."""
    console.print(
        f"{scale.rounds} rounds, seeds {', '.join(map(str, scale.seeds))}, fp32 payloads, outer lr {scale.outer.lr:g}, "
        f"momentum {scale.outer.momentum:g}. (nudged): initial parameters changed by a millionth; that is noise.",
        highlight=False,
    )
    table = Table(title="Unequal quotas", title_justify="left", title_style="bold", header_style="dim")
    for heading in ("inner steps\na round", "tokens", "held-out loss", "vs equal %"):
        table.add_column(heading, justify="right")
    for (due, nudge), group in groupby(rows, key=lambda row: (row.due, row.nudge)):
        seeds = list(group)
        against = [row.against_equal_percent for row in seeds if row.against_equal_percent is not None]
        losses = spread([row.heldout_loss for row in seeds], ".4f")
        table.add_row(due + " (nudged)" * bool(nudge), amount(seeds[0].tokens), losses, with_error(against))
    console.print(table)
