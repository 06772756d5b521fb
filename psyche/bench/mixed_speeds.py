"""Measure nodes of different speeds in one run: whether they finish a round together, and each node's idle share.

The run uses the ordinary commands on the loopback interface. Only the duration of an inner step is emulated: see
:mod:`psyche.bench.harness.paced_engine`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated

from rich.console import Console

from psyche.bench.harness.node_runs import run_nodes, small_config
from psyche.bench.harness.rows import Column, Result, Row, milliseconds, percent, run_bench, table
from psyche.bench.harness.shaped_links import on_loopback
from psyche.bench.utilisation import counted_metrics, train_and_round_seconds
from psyche.config import Config, Rounds
from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.store import Ledger
from psyche.protocol.chain import claimed
from psyche.protocol.messages import Record
from psyche.telemetry.event_log import read_events
from psyche.telemetry.events import PhaseChanged, RoundStarted

SKIPPED = 3
"""Rounds at the start that do not count: in the first no node's speed is known and slow nodes stop early; two more
measure the speeds."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    speeds: Sequence[float]
    """Speed of each node, relative to the others."""
    step_seconds: float = 0.2
    """Duration of an inner step on the fastest node."""
    inner_steps: int = 40
    """H."""
    rounds: int = 6
    """Rounds that count."""

    @property
    def step_seconds_of_nodes(self) -> list[float]:
        """Duration of an inner step on each node."""
        return [self.step_seconds * max(self.speeds) / speed for speed in self.speeds]

    @property
    def counted(self) -> range:
        """Numbers of the rounds that count."""
        return range(SKIPPED + 1, SKIPPED + self.rounds + 1)

    @property
    def config(self) -> Config:
        """Configuration of the run."""
        config, members = small_config("mixed"), len(self.speeds)
        rounds = Rounds(total=SKIPPED + self.rounds, inner_steps=self.inner_steps, start_members=members)
        return config.model_copy(update={"run": config.run.model_copy(update={"rounds": rounds})})


class MixedRow(Row, frozen=True):
    """One node. Means and medians are over the rounds that count."""

    node: Annotated[str, Column("node", left=True)]
    step_seconds: Annotated[float, Column("step\nms", milliseconds)]
    """Mean duration of its inner steps."""
    first_quota: int
    """Inner steps that it was assigned in the first round."""
    first_done: int
    """Inner steps that it was credited with in the first round."""
    quota: Annotated[float, Column("quota", ".1f")]
    """Inner steps that it was assigned, mean."""
    done: Annotated[float, Column("did", ".1f")]
    """Inner steps that it was credited with, mean."""
    ends: Annotated[float, Column("commits\nafter s", ".2f")]
    """Seconds from the start of the round to its commitment, median."""
    waits: Annotated[float, Column("waits for\nothers %", percent)]
    """Share of the round that it waited for slower members, mean."""
    idle: Annotated[float, Column("idle %", percent)]
    """Share of the round outside inner steps: waiting, exchange, outer step and evaluation."""
    rounds: int

    @property
    def first_round(self) -> Annotated[str, Column("round 1\ndid", after="step_seconds")]:
        return f"{self.first_done} of {self.first_quota}"


@dataclass
class MixedResult(Result[MixedRow]):
    """Rows, and the durations of a whole round."""

    training: float = 0.0
    """Seconds from the start of a round to its last commitment, median."""
    ideal: float = 0.0
    """Seconds of H steps on the fastest node."""
    equal: float = 0.0
    """Seconds of H steps on the slowest node: the duration of a round in which all have equal quotas."""

    @property
    def over(self) -> float:
        """By which share ``training`` exceeds ``ideal``."""
        return self.training / self.ideal - 1


def main(json: Path | None, plan: Plan) -> None:
    """Run ``psyche bench mixed``. Raises ``PsycheError``."""
    run_bench(json, lambda: measure(plan), lambda found: found.rows, lambda found, console: show(plan, found, console))


def measure(plan: Plan) -> MixedResult:
    """Run ``plan``. Raises :class:`PsycheError`."""
    with tempfile.TemporaryDirectory(prefix="psyche-bench-") as folder:
        places = on_loopback(len(plan.speeds) + 1)
        return result_of(plan, *run_nodes(places, plan.config, plan.step_seconds_of_nodes, Path(folder)))


def result_of(plan: Plan, coordinator: Path, nodes: Sequence[Path]) -> MixedResult:
    """Evaluate the event logs and the ledger of a finished run.

    Raises :class:`PsycheError` if a node took part in no round.
    """
    began = {event.round: event.time for event in read_events(coordinator) if isinstance(event, RoundStarted)}
    with Ledger.read(coordinator.parent / LEDGER) as ledger:
        records = {entry.round: claimed(entry.certificate).record for entry in ledger.entries()}
    committed = [_commit_times(log) for log in nodes]
    last = {number: max(times.get(number, 0.0) for times in committed) for number in plan.counted}
    rows = [
        _row(plan, f"node-{number}", log, records, began, times, last)
        for number, (log, times) in enumerate(zip(nodes, committed, strict=True), 1)
    ]
    steps = [row.step_seconds for row in rows]
    return MixedResult(
        rows=rows,
        training=median(last[number] - began[number] for number in plan.counted),
        ideal=plan.inner_steps * min(steps),
        equal=plan.inner_steps * max(steps),
    )


def _commit_times(log: Path) -> dict[int, float]:
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
) -> MixedRow:
    rounds = counted_metrics(name, log, plan.counted)
    peer, numbers = rounds[0].peer, [event.round for event in rounds]
    train, whole = train_and_round_seconds(rounds)
    return MixedRow(
        node=name,
        step_seconds=train / max(1, sum(event.inner_steps for event in rounds)),
        first_quota=_quota(records[1], peer),
        first_done=_done(records[1], peer),
        quota=fmean(_quota(records[number], peer) for number in numbers),
        done=fmean(_done(records[number], peer) for number in numbers),
        ends=median(committed[number] - began[number] for number in numbers),
        waits=sum(last[number] - committed[number] for number in numbers) / whole,
        idle=1 - train / whole,
        rounds=len(rounds),
    )


def _quota(record: Record, peer: str) -> int:
    member = record.plan.member(peer)
    return member.inner_steps if member else 0


def _done(record: Record, peer: str) -> int:
    return next((one.contribution.inner_steps for one in record.accepted if one.node == peer), 0)


def show(plan: Plan, found: MixedResult, console: Console) -> None:
    """Print the table and how to read it."""
    console.print(
        f"{len(plan.speeds)} nodes, H {plan.inner_steps}. The first {SKIPPED} rounds do not count. From a round's "
        f"start to its last commitment {found.training:.2f} s, {100 * found.over:+.1f} % of the {found.ideal:.2f} s "
        f"that H steps take on the fastest node; equal quotas would take the slowest node's {found.equal:.2f} s.\n",
        highlight=False,
    )
    console.print(table("Mixed hardware", found.rows))
