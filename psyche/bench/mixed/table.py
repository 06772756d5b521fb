"""The rows of a run of mixed nodes, from its logs and its ledger, and the table made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import msgspec
from rich.table import Table

from psyche.bench.mixed.plan import Plan
from psyche.errors import PsycheError
from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.store import Ledger
from psyche.protocol.ledger import claimed
from psyche.protocol.messages import Record
from psyche.telemetry.event_log import read_events
from psyche.telemetry.events import MemberMetrics, PhaseChanged, RoundStarted


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One node; a flat dict of JSON has these fields. Means are over the rounds that count."""

    node: str
    step_seconds: float
    """Mean of the inner steps it took."""
    quota: float
    """Inner steps it owed, mean."""
    done: float
    """Inner steps it was credited with, mean."""
    first_quota: int
    first_done: int
    """In the run's first round, of the H that all owed."""
    ends: float
    """Seconds from the round's beginning to its commitment, median."""
    waits: float
    """Share of the round that it waited for slower members, mean."""
    idle: float
    """Share of the round outside inner steps: that, exchange, outer step and judging."""
    rounds: int


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run."""

    rows: list[Row]
    training: float
    """Seconds from a round's beginning to its last commitment, median."""
    ideal: float
    """H steps of the fastest."""
    equal: float
    """H steps of the slowest: what all would wait for if all owed the same."""

    @property
    def over(self) -> float:
        """How much longer than ideal, as a share."""
        return self.training / self.ideal - 1


def found_in(plan: Plan, coordinator: Path, nodes: Sequence[Path]) -> Found:
    """What the event logs of a finished run say. Raises :class:`PsycheError` where a node took part in no round."""
    began = {event.round: event.time for event in read_events(coordinator) if isinstance(event, RoundStarted)}
    with Ledger.read(coordinator.parent / LEDGER) as ledger:
        records = {entry.round: claimed(entry.certificate).record for entry in ledger.entries()}
    committed = {log: _committed(log) for log in nodes}
    last = {number: max(told.get(number, 0.0) for told in committed.values()) for number in plan.counted}
    rows = [
        _row(plan, f"node-{number}", log, records, began, committed[log], last) for number, log in enumerate(nodes, 1)
    ]
    steps = [row.step_seconds for row in rows]
    return Found(
        rows=rows,
        training=median(last[number] - began[number] for number in plan.counted),
        ideal=plan.inner_steps * min(steps),
        equal=plan.inner_steps * max(steps),
    )


def _committed(log: Path) -> dict[int, float]:
    """When a node had done its inner steps, by round."""
    events = (event for event in read_events(log) if isinstance(event, PhaseChanged))
    return {event.round: event.time for event in events if event.phase == "committing"}


def _row(
    plan: Plan,
    name: str,
    log: Path,
    records: Mapping[int, Record],
    began: Mapping[int, float],
    committed: Mapping[int, float],
    last: Mapping[int, float],
) -> Row:
    told = [event for event in read_events(log) if isinstance(event, MemberMetrics) and event.round in plan.counted]
    if not told:
        raise PsycheError(f"{name} took part in no round that counts (its log: {log})")
    peer = told[0].peer
    quota = {number: _quota(record, peer) for number, record in records.items()}
    done = {number: _done(record, peer) for number, record in records.items()}
    train, whole = (sum(getattr(event, name) or 0.0 for event in told) for name in ("train_seconds", "round_seconds"))
    counted = [event.round for event in told]
    waited = sum(last[number] - committed[number] for number in counted)
    return Row(
        node=name,
        step_seconds=train / max(1, sum(event.inner_steps for event in told)),
        quota=fmean(quota[number] for number in counted),
        done=fmean(done[number] for number in counted),
        first_quota=quota[1],
        first_done=done[1],
        ends=median(committed[number] - began[number] for number in counted),
        waits=waited / whole,
        idle=1 - train / whole,
        rounds=len(counted),
    )


def _quota(record: Record, peer: str) -> int:
    member = record.plan.member(peer)
    return member.inner_steps if member else 0


def _done(record: Record, peer: str) -> int:
    return next((one.contribution.inner_steps for one in record.accepted if one.node == peer), 0)


def to_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A list of flat dicts."""
    return [msgspec.to_builtins(row) for row in rows]


def table(rows: Sequence[Row]) -> Table:
    """One line a node."""
    shown = Table(title="Mixed hardware", title_justify="left", title_style="bold", header_style="dim")
    shown.add_column("node")
    for heading in ("step\nms", "round 1\ndid", "quota", "did", "commits\nafter s", "waits for\nothers %", "idle %"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            row.node,
            f"{1e3 * row.step_seconds:.0f}",
            f"{row.first_done} of {row.first_quota}",
            f"{row.quota:.1f}",
            f"{row.done:.1f}",
            f"{row.ends:.2f}",
            f"{100 * row.waits:.1f}",
            f"{100 * row.idle:.1f}",
        )
    return shown
