"""The utilisation bench's rows, and the table made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.table import Table

from psyche.bench.codec.table import percent
from psyche.bench.utilisation.plan import LAST, SKIPPED, Trial
from psyche.errors import PsycheError
from psyche.telemetry.event_log import read_events
from psyche.telemetry.events import MemberMetrics, RoundSummary
from psyche.telemetry.formatting import number


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One node of one run; a flat dict of JSON has these fields."""

    overlap: str
    """``none``, ``tail`` or ``fragments``."""
    fragments: int
    overlap_steps: int
    """Allowed in a round."""
    inner_steps: int
    """A round."""
    peers: int
    params: int
    codec: str
    rate_mbit: float
    """Of each link."""
    node: str
    rounds: int
    """Counted ones."""
    step_seconds: float
    """Mean, as measured."""
    train_seconds: float
    """In inner steps, all counted rounds together."""
    round_seconds: float
    """All counted rounds together."""
    utilisation: float
    """train_seconds / round_seconds."""
    exchange_seconds: float
    """Median over rounds: from a payload being ready to its outer step being taken."""
    exchange_ratio: float
    """Of that over the inner steps of a round."""
    heldout_loss: float | None
    """Of the last round, over all nodes: nats a token."""


def rows_of(trial: Trial, coordinator: Path, nodes: Sequence[Path]) -> list[Row]:
    """A row for each node's event log. Raises :class:`PsycheError` where a node told of no round that counts."""
    losses = [event.heldout_loss for event in read_events(coordinator) if isinstance(event, RoundSummary)]
    return [_row(trial, f"node-{number}", log, losses[-1:]) for number, log in enumerate(nodes, 1)]


def to_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A list of flat dicts."""
    return [msgspec.to_builtins(row) for row in rows]


def table(rows: Sequence[Row]) -> Table:
    """One line a node."""
    shown = Table(title="Utilisation", title_justify="left", title_style="bold", header_style="dim")
    for heading in ("overlap", "node"):
        shown.add_column(heading)
    for heading in ("fragments", "late\nsteps", "inner\nsteps", "step\nms", "rounds", "exchange\nseconds"):
        shown.add_column(heading, justify="right")
    for heading in ("exchange/\ncompute %", "training\n% of time", "held-out\nloss"):
        shown.add_column(heading, justify="right")
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before.overlap != row.overlap:
            shown.add_section()
        shown.add_row(
            row.overlap,
            row.node,
            str(row.fragments),
            str(row.overlap_steps),
            str(row.inner_steps),
            number(1e3 * row.step_seconds, ".0f"),
            str(row.rounds),
            number(row.exchange_seconds, ".2f"),
            percent(row.exchange_ratio),
            percent(row.utilisation),
            number(row.heldout_loss),
        )
    return shown


def _row(trial: Trial, node: str, log: Path, losses: Sequence[float | None]) -> Row:
    run = trial.config.run
    counted = range(SKIPPED * run.overlap.fragments + 1, run.rounds.total - LAST + 1)
    told = [event for event in read_events(log) if isinstance(event, MemberMetrics) and event.round in counted]
    if not told:
        raise PsycheError(f"{node} took part in no round that counts (its log: {log})")
    train, whole = (sum(getattr(event, name) or 0.0 for event in told) for name in ("train_seconds", "round_seconds"))
    step = train / max(1, sum(event.inner_steps for event in told))
    exchange = median(event.exchange_seconds or 0.0 for event in told)
    return Row(
        overlap=trial.way,
        fragments=run.overlap.fragments,
        overlap_steps=run.overlap.overlap_steps,
        inner_steps=run.rounds.inner_steps,
        peers=run.rounds.start_members,
        params=trial.parameters,
        codec=run.codec.name,
        rate_mbit=trial.rate / 1e6,
        node=node,
        rounds=len(told),
        step_seconds=step,
        train_seconds=train,
        round_seconds=whole,
        utilisation=train / whole,
        exchange_seconds=exchange,
        exchange_ratio=exchange / (step * run.rounds.inner_steps),
        heldout_loss=losses[0] if losses else None,
    )
