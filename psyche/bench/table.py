"""The bench's rows, and the tables made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from math import sqrt
from statistics import fmean, stdev
from typing import Any, Literal

from rich.table import Table

from psyche.bench.plan import NUDGE, Comparison, Item
from psyche.bench.trials import Outcome, Trial
from psyche.telemetry.formatting import amount, number


@dataclass(frozen=True)
class Row:
    """One trial in one comparison; a flat dict of JSON has these fields. ``None``: it has none (AdamW)."""

    name: str
    comparison: Comparison
    system: str
    codec: str
    nodes: int
    outer_lr: float | None
    momentum: float | None
    inner_steps: int | None
    """H."""
    optimizer: str
    """Inner."""
    inner_lr: float | None
    """None: that of the bench."""
    seed: int
    nudge: float
    """Relative change of the initial parameters; not 0 in the control of the codecs' difference."""
    tokens: int
    """All nodes together."""
    steps_per_node: int
    parameters: int
    heldout_loss: float
    """Nats a token, of the outer parameters."""
    against_large_batch_percent: float | None
    """100 × (loss / loss of large-batch AdamW of the same seed, tokens and steps − 1); positive is worse. None where
    ``--only`` left that one out."""
    bytes_per_token: float
    payload_ratio: float
    seconds: float
    """Of the trial alone, on one core that others may share."""


def rows_of(items: Iterable[Item], outcomes: Mapping[Trial, Outcome]) -> list[Row]:
    """The row of every item, in their order. ``outcomes`` holds their trials; references may be missing."""
    return [_row(item, outcomes[item.trial], outcomes.get(item.reference)) for item in items]


def _row(item: Item, outcome: Outcome, reference: Outcome | None) -> Row:
    trial = item.trial
    return Row(
        name=item.name,
        comparison=item.comparison,
        system=trial.system,
        codec=trial.codec,
        nodes=trial.nodes,
        outer_lr=trial.outer.lr if trial.outer else None,
        momentum=trial.outer.momentum if trial.outer else None,
        inner_steps=trial.inner_steps,
        optimizer=trial.optimizer,
        inner_lr=trial.inner_lr,
        seed=trial.seed,
        nudge=trial.nudge,
        tokens=outcome.tokens,
        steps_per_node=trial.steps,
        parameters=outcome.parameters,
        heldout_loss=outcome.heldout_loss,
        against_large_batch_percent=percent(outcome.heldout_loss, reference.heldout_loss) if reference else None,
        bytes_per_token=outcome.bytes_per_token,
        payload_ratio=outcome.payload_ratio,
        seconds=round(outcome.seconds, 1),
    )


def percent(loss: float, reference: float) -> float:
    """By how much ``loss`` is above ``reference``, in % of it."""
    return 100 * (loss / reference - 1)


# ------------------------------------------------------------------------------- large batch against DiLoCo


def results_table(comparison: Comparison, rows: Sequence[Row]) -> Table:
    """The rows of one comparison, seeds folded into mean ± half their range."""
    table = Table(title=_TITLES[comparison], title_justify="left", title_style="bold", header_style="dim")
    for heading in ("system", "codec", "inner"):
        table.add_column(heading)
    headings = ["nodes", "outer\nlr", "momentum", "H", "tokens", "steps\n/node", "held-out loss"]
    for heading in [*headings, "vs large\nbatch %", "bytes/token\nsent", "payload\nratio"]:
        table.add_column(heading, justify="right")
    for _, of_nodes in groupby(rows, key=lambda row: row.nodes):
        for _, of_setting in groupby(of_nodes, key=_without_seed):
            table.add_row(*_cells(list(of_setting)))
        table.add_section()
    return table


_TITLES: dict[Comparison, str] = {
    "equal tokens": "(a) Equal total tokens: k nodes take 1/k of the steps each",
    "equal steps": "(b) Equal steps per node: k nodes see k times the tokens",
    "sensitivity": "Sensitivity of DiLoCo to outer lr, momentum and H",
    "inner optimizer": "AdamW and Muon inside DiLoCo, at equal tokens",
}


def _without_seed(row: Row) -> tuple[Any, ...]:
    return (
        row.system,
        row.codec,
        row.nudge,
        row.nodes,
        row.outer_lr,
        row.momentum,
        row.inner_steps,
        row.optimizer,
        row.inner_lr,
    )


def _cells(seeds: Sequence[Row]) -> list[str]:
    row = seeds[0]
    against = [r.against_large_batch_percent for r in seeds if r.against_large_batch_percent is not None]
    is_reference = row.system == "adamw"
    return [
        row.system,
        f"{row.codec}, nudged" if row.nudge else row.codec,
        row.optimizer if row.inner_lr is None else f"{row.optimizer} {row.inner_lr:g}",
        str(row.nodes),
        number(row.outer_lr, "g"),
        number(row.momentum, "g"),
        number(row.inner_steps, "g"),
        amount(row.tokens),
        f"{row.steps_per_node:,}",
        spread([r.heldout_loss for r in seeds], ".4f"),
        "–" if is_reference or not against else spread(against, "+.2f"),
        f"{row.bytes_per_token:,.1f}",
        f"{row.payload_ratio:.2f}×",
    ]


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± half the range; the value alone where there is but one."""
    mean = format(fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:{form.lstrip('+')}}"


# --------------------------------------------------------------------------------------- int8 against fp32


@dataclass(frozen=True)
class Difference:
    """int8 DiLoCo, or fp32 DiLoCo from nudged parameters, against fp32 DiLoCo at one setting."""

    variant: Literal["int8", "nudged"]
    nodes: int
    steps: int
    percents: dict[int, float]
    """By seed: :func:`percent` of the variant's loss over the fp32 loss of the same seed."""

    @property
    def mean(self) -> float:
        return fmean(self.percents.values())


def differences_to_fp32(rows: Iterable[Row], variant: Literal["int8", "nudged"]) -> list[Difference]:
    """One for each setting of the two comparisons that was measured both ways; a trial in both counts once."""
    losses: dict[tuple[int, int], dict[tuple[str, int], float]] = {}
    for row in rows:
        if row.system == "diloco" and row.comparison in ("equal tokens", "equal steps"):
            of_setting = losses.setdefault((row.nodes, row.steps_per_node), {})
            of_setting["nudged" if row.nudge else row.codec, row.seed] = row.heldout_loss
    found = []
    for (nodes, steps), loss in losses.items():
        seeds = sorted(seed for name, seed in loss if name == variant and ("fp32", seed) in loss)
        percents = {seed: percent(loss[variant, seed], loss["fp32", seed]) for seed in seeds}
        if percents:
            found.append(Difference(variant, nodes, steps, percents))
    return found


def differences_table(differences: Sequence[Difference]) -> Table:
    """:func:`differences_to_fp32` for people."""
    title = "Against fp32 DiLoCo at the same settings and seed: held-out loss in % (positive is worse)"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    table.add_column("what differs")
    seeds = sorted({seed for difference in differences for seed in difference.percents})
    for heading in ["nodes", "steps/node", *(f"seed {seed}" for seed in seeds), "mean"]:
        table.add_column(heading, justify="right")
    for one in differences:
        cells = [f"{one.percents[seed]:+.3f}" if seed in one.percents else "–" for seed in seeds]
        table.add_row(WHAT_DIFFERS[one.variant], str(one.nodes), f"{one.steps:,}", *cells, f"{one.mean:+.3f}")
    return table


WHAT_DIFFERS = {"int8": "codec int8", "nudged": f"initial parameters × (1 + {NUDGE:g})"}


def verdict(differences: Sequence[Difference]) -> str:
    """One sentence on all pairs of one variant: their mean and its standard error, the spread of one pair."""
    pairs = [value for one in differences for value in one.percents.values()]
    text = f"{WHAT_DIFFERS[differences[0].variant]}: mean {fmean(pairs):+.3f} %"
    if len(pairs) > 1:
        text += f" ± {stdev(pairs) / sqrt(len(pairs)):.3f} (standard error), standard deviation {stdev(pairs):.3f}"
    return f"{text}, furthest {max(pairs, key=abs):+.3f} %, over {len(pairs)} pairs"


def to_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A list of flat dicts."""
    return [asdict(row) for row in rows]
