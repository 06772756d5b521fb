"""The bench's rows, and the tables made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

from psyche.bench.plan import Comparison, Item
from psyche.bench.trials import Outcome, Trial
from psyche.telemetry.wording import amount, number


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
    seed: int
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
        outer_lr=trial.outer_lr,
        momentum=trial.momentum,
        inner_steps=trial.inner_steps,
        seed=trial.seed,
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
    for heading in ("system", "codec"):
        table.add_column(heading)
    headings = ["nodes", "outer lr", "momentum", "H", "tokens", "steps/node", "held-out loss"]
    for heading in [*headings, "vs large batch %", "bytes/token sent", "payload ratio"]:
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
}


def _without_seed(row: Row) -> tuple[Any, ...]:
    return (row.system, row.codec, row.nodes, row.outer_lr, row.momentum, row.inner_steps)


def _cells(seeds: Sequence[Row]) -> list[str]:
    row = seeds[0]
    against = [r.against_large_batch_percent for r in seeds if r.against_large_batch_percent is not None]
    is_reference = row.system == "adamw"
    return [
        row.system,
        row.codec,
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


def codec_differences(rows: Iterable[Row]) -> dict[tuple[Comparison, int], list[float]]:
    """int8 against fp32 DiLoCo, same seed and settings, in %: one value a seed for each (comparison, nodes)."""
    losses: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row.system == "diloco" and row.comparison != "sensitivity":
            losses.setdefault((row.comparison, row.nodes, row.seed), {})[row.codec] = row.heldout_loss
    found: dict[tuple[Comparison, int], list[float]] = {}
    for (comparison, nodes, _), by_codec in losses.items():
        if len(by_codec) == 2:
            found.setdefault((comparison, nodes), []).append(percent(by_codec["int8"], by_codec["fp32"]))
    return found


def codec_table(differences: Mapping[tuple[Comparison, int], Sequence[float]], seeds: int) -> Table:
    """:func:`codec_differences` for people; the last line is over all of them."""
    title = "int8 against fp32 DiLoCo at the same settings and seed, held-out loss in % (positive: int8 is worse)"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    table.add_column("comparison")
    for heading in ["nodes", *(f"seed {one}" for one in range(seeds)), "mean"]:
        table.add_column(heading, justify="right")
    for (comparison, nodes), values in differences.items():
        cells = [f"{value:+.3f}" for value in values] + [""] * (seeds - len(values))
        table.add_row(comparison, str(nodes), *cells, f"{fmean(values):+.3f}")
    return table


def codec_verdict(differences: Mapping[tuple[Comparison, int], Sequence[float]]) -> str:
    """One sentence on all pairs: mean, its standard error, the largest."""
    pairs = [value for values in differences.values() for value in values]
    worst = max(pairs, key=abs)
    error = f" ± {stdev(pairs) / sqrt(len(pairs)):.3f}" if len(pairs) > 1 else ""
    means = max((fmean(values) for values in differences.values()), key=abs)
    return (
        f"int8 against fp32 over {len(pairs)} pairs: mean {fmean(pairs):+.3f} %{error} (standard error); "
        f"largest mean of a setting {means:+.3f} %, largest of a single pair {worst:+.3f} %"
    )


def to_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A list of flat dicts."""
    return [asdict(row) for row in rows]
