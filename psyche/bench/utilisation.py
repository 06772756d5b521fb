"""Measure the share of its time that a node trains, with and without overlap, when an exchange takes long.

Every run uses the ordinary commands, each in a network namespace behind its own link. Only the duration of an inner
step is emulated: see :mod:`psyche.bench.harness.paced_engine`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

from rich.console import Console

from psyche.bench.harness.node_runs import run_nodes, small_config
from psyche.bench.harness.rows import Column, Row, milliseconds, percent, run_bench, table
from psyche.bench.harness.shaped_links import Link, congestion_control, shaped
from psyche.bench.harness.turns import say
from psyche.config import Config, Overlap, Rounds, Run, load_config
from psyche.errors import PsycheError
from psyche.exchange.cost import ExchangeSizes, sharded_from
from psyche.numerics.codecs.registry import codec
from psyche.telemetry.event_log import read_events
from psyche.telemetry.events import MemberMetrics, RoundSummary
from psyche.telemetry.formatting import amount
from psyche.training.models import layout

Mode = Literal["none", "tail", "fragments"]
MODES: tuple[Mode, ...] = ("none", "tail", "fragments")
FRAGMENTS = 2
SLACK = 2.0
"""Overlap steps allowed, over the steps that the bytes alone take at full rate: links are shared and voting is added.
An exchange of 4 nodes took 1.7 times as long as its bytes."""
SKIPPED = 2
"""Rounds at the start that do not count: connections are made and deadlines are found."""
LAST = 1
"""Rounds at the end that do not count: the last one has no next round to train for during its exchange."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    peers: int
    ratio: float
    """Transfer time over computing time of a round without overlap."""
    rate: int | None = None
    """Rate of each link, bit/s. ``None``: the rate at which the exchange takes ``ratio`` of a round's computing."""
    modes: Sequence[Mode] = MODES
    rounds: int = 6
    """Rounds that count."""
    step_seconds: float = 0.2
    """Duration of an inner step."""
    inner_steps: int = 40
    """H without fragments. If ``rate`` is given, H is chosen so that ``ratio`` holds."""
    config: Path | None = None
    """A run to take model, data and codec from. ``None``: a small one."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan."""

    mode: Mode
    config: Config
    rate: int
    """Rate of each link, bit/s."""
    step_seconds: float
    parameters: int


class UtilisationRow(Row, frozen=True):
    """One node of one run."""

    overlap: Annotated[str, Column("overlap", left=True)]
    """``none``, ``tail`` or ``fragments``."""
    node: Annotated[str, Column("node", left=True)]
    fragments: Annotated[int, Column("fragments")]
    overlap_steps: Annotated[int, Column("overlap\nsteps")]
    """Overlap steps allowed in a round."""
    inner_steps: Annotated[int, Column("inner\nsteps")]
    """Inner steps of a round."""
    peers: int
    params: int
    codec: str
    rate_mbit: float
    """Rate of each link."""
    step_seconds: Annotated[float, Column("step\nms", milliseconds)]
    """Mean duration of an inner step, as measured."""
    rounds: Annotated[int, Column("rounds")]
    """Rounds that count."""
    train_seconds: float
    """Time in inner steps, all counted rounds together."""
    round_seconds: float
    """Duration of all counted rounds together."""
    exchange_seconds: Annotated[float, Column("exchange\nseconds", ".2f")]
    """Median over rounds: from a ready payload to the outer step."""
    exchange_ratio: Annotated[float, Column("exchange/\ncompute %", percent)]
    """exchange_seconds over the time of a round's inner steps."""
    utilisation: Annotated[float, Column("training\n% of time", percent)]
    """train_seconds / round_seconds."""
    heldout_loss: Annotated[float | None, Column("held-out\nloss", ".3f")]
    """Nats per token in the last round, over all nodes."""


def main(json: Path | None, plan: Plan) -> None:
    """Run ``psyche bench utilisation``. Raises ``PsycheError``."""
    runs = planned_runs(plan)
    run_bench(json, lambda: measure(runs), list, lambda rows, console: show(plan, runs, rows, console))


def planned_runs(plan: Plan) -> list[PlannedRun]:
    """List the runs of ``plan``. Raises :class:`PsycheError` if its configuration cannot be used."""
    config = small_config("utilisation") if plan.config is None else load_config(plan.config)
    sent = exchange_bytes(config.run, plan.peers)
    rate, steps = plan.rate, plan.inner_steps
    if rate is None:
        rate = round(8 * sent / (plan.ratio * steps * plan.step_seconds))
    else:
        steps = max(1, round(8 * sent / rate / (plan.ratio * plan.step_seconds)))
    parameters = layout(config.run.model).parameters
    return [
        PlannedRun(mode, _configured(config, plan, mode, steps), rate, plan.step_seconds, parameters)
        for mode in plan.modes
    ]


def with_modes(plan: Plan, names: Sequence[str]) -> Plan:
    """Return ``plan`` with the modes named, or with all of them. Raises :class:`PsycheError` for an unknown name."""
    if unknown := [name for name in names if name not in MODES]:
        raise PsycheError(f"--overlap {unknown[0]}: unknown mode; choose from {', '.join(MODES)}")
    return replace(plan, modes=tuple(mode for mode in MODES if mode in names) or MODES)


def exchange_bytes(run: Run, peers: int) -> int:
    """Return bytes that a peer sends, and receives, when the whole model is exchanged at once."""
    whole = layout(run.model).fragments(1)
    shapes = ExchangeSizes.of(codec(run.codec.name), codec(run.result_codec), [p.stop - p.start for p in whole[0]])
    first = sharded_from(run, whole)
    sharded = first is not None and peers >= first
    return (shapes.sharded(peers, run.exchange.reducers) if sharded else shapes.gather(peers)).up


def overlap_of(mode: Mode, steps: int, ratio: float) -> tuple[Overlap, int]:
    """Return the setting and a round's inner steps, such that each parameter is exchanged about every ``steps``."""
    fragments = FRAGMENTS if mode == "fragments" else 1
    each = max(1, steps // fragments)
    overlap_steps = 0 if mode == "none" else min(each, ceil(SLACK * ratio * each) + 1)
    return Overlap(fragments=fragments, overlap_steps=overlap_steps), each


def _configured(config: Config, plan: Plan, mode: Mode, steps: int) -> Config:
    overlap, each = overlap_of(mode, steps, plan.ratio)
    total = (plan.rounds + SKIPPED) * overlap.fragments + LAST
    rounds = Rounds(total=total, inner_steps=each, start_members=plan.peers, min_members=config.run.rounds.min_members)
    run = config.run.model_copy(update={"rounds": rounds, "overlap": overlap})
    return config.model_copy(update={"run": run})


def measure(runs: Sequence[PlannedRun]) -> list[UtilisationRow]:
    """Run them one after another. Raises :class:`PsycheError`."""
    rows: list[UtilisationRow] = []
    for planned in runs:
        peers = planned.config.run.rounds.start_members
        links = [Link(), *[Link(planned.rate, planned.rate)] * peers]
        with tempfile.TemporaryDirectory(prefix="psyche-bench-") as folder, shaped(links) as places:
            coordinator, nodes = run_nodes(places, planned.config, [planned.step_seconds] * peers, Path(folder))
            found = rows_of(planned, coordinator, nodes)
        typical = median(row.utilisation for row in found)
        say(f"{planned.mode:10} {100 * typical:.1f} % of the time in inner steps")
        rows += found
    return rows


def rows_of(planned: PlannedRun, coordinator: Path, nodes: Sequence[Path]) -> list[UtilisationRow]:
    """Return a row for each node's event log. Raises :class:`PsycheError` if a node has no round that counts."""
    losses = [event.heldout_loss for event in read_events(coordinator) if isinstance(event, RoundSummary)]
    return [_row(planned, f"node-{number}", log, losses[-1:]) for number, log in enumerate(nodes, 1)]


def _row(planned: PlannedRun, node: str, log: Path, losses: Sequence[float | None]) -> UtilisationRow:
    run = planned.config.run
    counted = range(SKIPPED * run.overlap.fragments + 1, run.rounds.total - LAST + 1)
    rounds = counted_metrics(node, log, counted)
    train, whole = train_and_round_seconds(rounds)
    step = train / max(1, sum(event.inner_steps for event in rounds))
    exchange = median(event.exchange_seconds or 0.0 for event in rounds)
    return UtilisationRow(
        overlap=planned.mode,
        node=node,
        fragments=run.overlap.fragments,
        overlap_steps=run.overlap.overlap_steps,
        inner_steps=run.rounds.inner_steps,
        peers=run.rounds.start_members,
        params=planned.parameters,
        codec=run.codec.name,
        rate_mbit=planned.rate / 1e6,
        step_seconds=step,
        rounds=len(rounds),
        train_seconds=train,
        round_seconds=whole,
        exchange_seconds=exchange,
        exchange_ratio=exchange / (step * run.rounds.inner_steps),
        utilisation=train / whole,
        heldout_loss=losses[0] if losses else None,
    )


def counted_metrics(node: str, log: Path, counted: range) -> list[MemberMetrics]:
    """Read a node's metrics of the ``counted`` rounds. Raises :class:`PsycheError` if there are none."""
    found = [event for event in read_events(log) if isinstance(event, MemberMetrics) and event.round in counted]
    if not found:
        raise PsycheError(f"{node} took part in no round that counts; its log is {log}")
    return found


def train_and_round_seconds(rounds: Sequence[MemberMetrics]) -> tuple[float, float]:
    """Time in inner steps, and duration, of all ``rounds`` together."""
    return sum(one.train_seconds or 0.0 for one in rounds), sum(one.round_seconds or 0.0 for one in rounds)


def show(plan: Plan, runs: Sequence[PlannedRun], rows: Sequence[UtilisationRow], console: Console) -> None:
    """Print the table and how to read it."""
    first = runs[0]
    console.print(
        f"{plan.peers} nodes, {amount(first.parameters)} parameters, {first.config.run.codec.name}, links of "
        f"{first.rate / 1e6:.3g} Mbit/s (TCP {congestion_control()}): transferring the bytes takes "
        f"{100 * plan.ratio:.0f} % of a round's computing.\nA step takes {1e3 * plan.step_seconds:g} ms, mostly sleep, "
        f"as while a GPU works. The first {SKIPPED} rounds and the last one do not count.\n",
        highlight=False,
        markup=False,
    )
    console.print(table("Utilisation", rows, section=lambda row: row.overlap))
