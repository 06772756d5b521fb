"""Measure the time from ``psyche join`` to the first inner step on shaped links, and what it costs the donors.

The rival is the lower bound: importing the packages, and the state at the rate of the link. Every process is the
ordinary command, in a network namespace behind its own link. Only the duration of an inner step is emulated: see
:mod:`psyche.bench.harness.paced_engine`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Annotated, TypeVar

from rich.console import Console
from rich.table import Table

from psyche.bench.harness.node_runs import COORDINATOR, RunWatch, llama, start
from psyche.bench.harness.rows import Column, Row, percent, run_bench, transposed_table
from psyche.bench.harness.shaped_links import Link, Place, congestion_control, shaped
from psyche.bench.harness.turns import median_of, say
from psyche.config import BpeTokenizer, CodecSpec, Config, Data, Deadlines, Inner, Node, Rounds, Run, Wandb
from psyche.config.run_config import Audits
from psyche.errors import PsycheError
from psyche.telemetry.events import (
    Downloading,
    Event,
    PhaseChanged,
    Resynchronised,
    RoundCertified,
    RoundStarted,
    RunStarted,
    StepDone,
)
from psyche.telemetry.formatting import amount, size
from psyche.training.models import layout

BEFORE = 2
"""Rounds without a newcomer, which are compared with the rounds of a join."""
SKIPPED = 1
"""Rounds at the start that do not count: connections are made and memory is touched for the first time."""
HIDDEN = 512
TOTAL_ROUNDS = 10_000
"""Rounds of the run: more than it will reach."""
NEVER = 1_000
"""Rounds between checkpoints: every fifth round would be longer than the others, with or without a newcomer."""
IMPORTS = 3
"""Repeats of the import; the median counts."""
IMPORTED = ("psyche.processes.node_process", "psyche.telemetry.view")
"""Modules that a node imports before it begins."""

E = TypeVar("E", bound=Event)


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    peers: int = 4
    """Donors."""
    parameters: int = 15_000_000
    """Approximate parameters; the state has 8 bytes for each."""
    rate: int = 100_000_000
    """Rate of each link in each direction, bit/s."""
    at: Sequence[float] = (0.0, 0.8)
    """For each newcomer, the share of a round's inner steps after which it starts. One joins after another."""
    step_seconds: float = 1.0
    """Duration of an inner step."""
    inner_steps: int = 30
    codec: str = "int8"


@dataclass(frozen=True)
class PlannedJoin:
    """The run of a plan."""

    plan: Plan
    config: Config
    parameters: int
    state_bytes: int
    """Bytes of θ and m."""

    @property
    def line_seconds(self) -> float:
        """Transfer time of the state at the nominal rate."""
        return 8 * self.state_bytes / self.plan.rate


@dataclass(frozen=True)
class Newcomer:
    """One node that joined."""

    at: float
    """When in a round it started: the share of the inner steps that the donors had taken."""
    started: float
    """When its process was started, unix seconds."""
    import_seconds: float
    """Time to import the packages on this machine, measured right after it had joined."""
    events: list[Event]


_SECONDS = ".2f"


class JoinRow(Row, frozen=True):
    """One newcomer. Moments are seconds since its process was started."""

    at: float
    """When in a round it started: the share of the inner steps that were over."""
    peers: int
    """Donors in the run."""
    params: int
    codec: str
    rate_mbit: float
    """Rate of each link."""
    round_steps: int
    step_seconds: float
    imported: Annotated[float, Column("has imported its commands, s", _SECONDS)]
    """When it had imported its command line and began."""
    connected: Annotated[float, Column("is connected, has the manifest, s", _SECONDS)]
    """When it had joined the network and had the run manifest."""
    asked: Annotated[float, Column("asks for the state, s", _SECONDS)]
    """When it began to fetch the state."""
    fetched: Annotated[float, Column("has the state, s", _SECONDS)]
    """When it had loaded the state."""
    first_step: Annotated[float, Column("takes its first inner step, s", _SECONDS)]
    """When its first inner step began, which may be a warm-up step."""
    member: Annotated[float, Column("takes its first step of a round, s", _SECONDS, ends_section=True)]
    """When its first inner step as a member of a round began."""
    import_seconds: Annotated[float, Column("importing alone, s", _SECONDS)]
    """Time to import the packages in a separate process."""
    ideal_seconds: Annotated[float, Column("importing alone, and the line, s", _SECONDS)]
    """import_seconds plus the state at the link's rate."""
    ratio: Annotated[float, Column("first inner step, times that", _SECONDS, ends_section=True)]
    """first_step / ideal_seconds."""
    text_bytes: Annotated[int, Column("text fetched before", size)]
    """Bytes of training text, fetched before the state."""
    state_bytes: int
    transfer_seconds: Annotated[float, Column("transfer of the state, s", _SECONDS)]
    """From the first request for the loaded state to its last byte."""
    line_share: Annotated[float, Column("line used for it, %", percent)]
    """Bits of the state over the bits that the line could carry in transfer_seconds."""
    moved: Annotated[int, Column("rounds that the run went on meanwhile")]
    """Rounds certified during the transfer, whose outer steps were applied to the chunks already there."""
    donors: Annotated[int, Column("donors")]
    """Donors that sent a part of the state."""
    least_share: Annotated[float, Column("the least donor's part of an equal share, %", percent, ends_section=True)]
    """Bytes from the donor that sent least, over an equal share."""
    round_before: Annotated[float, Column("donors' round before, s", _SECONDS)]
    """Seconds of a donor's round without a newcomer: mean over donors and rounds."""
    round_during: Annotated[float, Column("donors' round meanwhile, s", _SECONDS)]
    """Seconds of a donor's round during the join: mean over donors and rounds."""
    slowed: Annotated[float, Column("slowed by, %", lambda share: f"{100 * share:+.1f}")]
    """round_during / round_before - 1."""
    fetching_share: Annotated[float, Column("share of it that the state was fetched in, %", percent)]
    """Share of the rounds during the join that passed while the newcomer fetched the state."""


def main(json: Path | None, plan: Plan) -> None:
    """Run ``psyche bench join``. Raises ``PsycheError``."""
    planned = planned_join(plan)
    run_bench(json, lambda: measure(planned), list, lambda rows, console: show(planned, rows, console))


def planned_join(plan: Plan) -> PlannedJoin:
    """Configure the run of ``plan``. Raises ``PsycheError`` if the model cannot be built."""
    config = _config(plan)
    flat = layout(config.run.model)
    return PlannedJoin(plan, config, flat.parameters, 2 * 4 * flat.size)


def _config(plan: Plan) -> Config:
    """Return a Llama with short sequences: its state is large and a step of it cheap, so that only the line is slow."""
    intermediate = 3 * HIDDEN
    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * intermediate
    layers = max(1, round((plan.parameters - 512 * HIDDEN) / layer))
    run = Run(
        name="join",
        model=llama(HIDDEN, intermediate, layers, heads=4),
        data=Data(tokenizer=BpeTokenizer(vocab_size=512), sequence_length=16, max_documents=200),
        inner=Inner(batch_size=1, schedule="constant", warmup_steps=10),
        codec=CodecSpec(name=plan.codec),
        rounds=Rounds(total=TOTAL_ROUNDS, inner_steps=plan.inner_steps, start_members=plan.peers),
        # Paced steps vary so little that a deadline from measured times would not tolerate half a second.
        deadlines=Deadlines(round_min=min(1800.0, max(20.0, 2 * plan.inner_steps * plan.step_seconds))),
        heldout_sequences=plan.peers,
        audits=Audits(rate=0.0),  # auditors sit out rounds, and rounds with and without a newcomer are compared
    )
    return Config(run=run, node=Node(threads=1, device="cpu", checkpoint_every=NEVER, wandb=Wandb(mode="disabled")))


# --------------------------------------------------------------------------------------------- a run


def measure(planned: PlannedJoin) -> list[JoinRow]:
    """Run the donors and let all newcomers join. Raises :class:`PsycheError`."""
    plan = planned.plan
    donors = [f"node-{number}" for number in range(1, plan.peers + 1)]
    links, newcomers = [Link(), *[Link(plan.rate, plan.rate)] * (plan.peers + 1)], []
    with tempfile.TemporaryDirectory(prefix="psyche-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        *places, last = stack.enter_context(shaped(links))
        watch = RunWatch(folder)
        for name, place in zip([COORDINATOR, *donors], places, strict=True):
            pace = None if name == COORDINATOR else plan.step_seconds
            watch.add(name, stack.enter_context(start(name, planned.config, place, folder, pace)))
        say(f"waiting for the first round of {plan.inner_steps} steps to end")
        watch.until(lambda: _rounds_of(watch) >= SKIPPED)
        for number, at in enumerate(plan.at, 1):
            newcomers.append(_join(planned, f"newcomer-{number}", last, folder, watch, at))
        return [row_of(planned, one, [watch.events[name] for name in donors]) for one in newcomers]


def _join(planned: PlannedJoin, name: str, place: Place, folder: Path, watch: RunWatch, at: float) -> Newcomer:
    """Start a newcomer after ``BEFORE`` rounds without one, and end it when it has taken a step of a round."""
    first = _rounds_of(watch) + 1  # the round that is open may have lost the newcomer before
    say(f"rounds without a newcomer: {first + 1} to {first + BEFORE}")
    watch.until(lambda: _rounds_of(watch) >= first + BEFORE)
    round_number, steps = first + BEFORE + 1, round_steps(planned, at)
    watch.until(lambda: _reached(watch, round_number, steps))
    say(f"a newcomer starts in round {round_number}, after {steps} of {planned.plan.inner_steps} steps")
    # It has no text yet, and it keeps checkpoints: in so young a run it would replay the rounds, not fetch the state.
    changes = {"cache": folder / f"{name}-cache", "checkpoint_every": 1, "checkpoints_kept": 1}
    config = planned.config.model_copy(update={"node": planned.config.node.model_copy(update=changes)})
    started = time.time()
    with start(name, config, place, folder, planned.plan.step_seconds) as process:
        watch.add(name, process)
        watch.until(lambda: bool(watch.of(name, StepDone)))
        events = watch.drop(name)
    # Measured now, in a round that does not count, while the machine is still as busy as it was.
    seconds = median_of(import_seconds() for _ in range(IMPORTS))
    say(f"it has joined; importing alone takes {seconds:.1f} s")
    return Newcomer(at, started, seconds, events)


def _rounds_of(watch: RunWatch) -> int:
    """Certified rounds so far."""
    return len(watch.of(COORDINATOR, RoundCertified))


def round_steps(planned: PlannedJoin, at: float) -> int:
    """Inner steps after which a newcomer starts."""
    return min(int(at * planned.plan.inner_steps), planned.plan.inner_steps - 1)


def _reached(watch: RunWatch, round_number: int, steps: int) -> bool:
    """Return whether the first donor has begun the round and taken ``steps`` steps of it."""
    if not steps:
        return any(event.round == round_number for event in watch.of("node-1", RoundStarted))
    return any(event.round == round_number and event.step >= steps for event in watch.of("node-1", StepDone))


def import_seconds() -> float:
    """Time to start a process that imports what a node needs to train a Llama. Raises :class:`PsycheError`."""
    model = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    program = (
        f"import time, {', '.join(IMPORTED)}; from psyche.config import Model; from psyche.training.models import "
        f"layout; layout(Model(settings={model})); print(time.time())"
    )
    began = time.time()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PsycheError(f"the packages of a node cannot be imported: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout) - began


# ---------------------------------------------------------------------------------------------- rows


def row_of(planned: PlannedJoin, newcomer: Newcomer, donors: Sequence[Sequence[Event]]) -> JoinRow:
    """Evaluate a newcomer's and the donors' events. Raises :class:`PsycheError` if the newcomer fetched no state."""
    plan, events, began = planned.plan, newcomer.events, newcomer.started
    states, phases = _of(events, Resynchronised), _of(events, PhaseChanged)
    if not states:
        raise PsycheError("the newcomer fetched no state: there were so few rounds that it replayed them")
    state = states[-1]
    member = _moment(event for event in phases if event.phase == "training")
    first = min(member, _moment((event for event in phases if event.phase == "warming"), member))
    asked = _moment(event for event in phases if event.phase == "joining" and event.round)
    transfer = state.seconds or 0.0
    ideal = newcomer.import_seconds + planned.line_seconds
    before, during, span = _round_seconds(donors, began, first)
    sent = [count for _, count in state.gave]
    return JoinRow(
        at=newcomer.at,
        peers=plan.peers,
        params=planned.parameters,
        codec=plan.codec,
        rate_mbit=plan.rate / 1e6,
        round_steps=plan.inner_steps,
        step_seconds=plan.step_seconds,
        imported=phases[0].time - began,
        connected=_of(events, RunStarted)[0].time - began,
        asked=asked - began,
        fetched=state.time - began,
        first_step=first - began,
        member=member - began,
        import_seconds=newcomer.import_seconds,
        ideal_seconds=ideal,
        ratio=(first - began) / ideal,
        text_bytes=max((event.total for event in _of(events, Downloading)), default=0),
        state_bytes=planned.state_bytes,
        transfer_seconds=transfer,
        line_share=planned.line_seconds / transfer,
        moved=state.moved,
        donors=len(sent),
        least_share=min(sent) * len(sent) / sum(sent),
        round_before=before,
        round_during=during,
        slowed=during / before - 1,
        fetching_share=(state.time - asked) / span,
    )


def _round_seconds(donors: Sequence[Sequence[Event]], began: float, ended: float) -> tuple[float, float, float]:
    """Mean seconds of a donor's rounds before and during ``[began, ended]``; the sum of the latter for one donor."""
    before: list[float] = []
    during: list[float] = []
    for events in donors:
        ends = [event.time for event in _of(events, RoundCertified)]
        spans = [(start, end) for start, end in pairwise(ends) if start < ended]
        before += [end - start for start, end in spans if end < began][-BEFORE:]
        during += [end - start for start, end in spans if end >= began]
    return mean(before), mean(during), sum(during) / len(donors)


def _moment(found: Iterable[Event], default: float | None = None) -> float:
    """Time of the first event. Raises :class:`PsycheError` if there is none and no default."""
    times = [event.time for event in found]
    if not times and default is None:
        raise PsycheError("the newcomer took no inner step")
    return times[0] if times or default is None else default


def _of(events: Iterable[Event], kind: type[E]) -> list[E]:
    return [event for event in events if isinstance(event, kind)]


def show(planned: PlannedJoin, rows: Sequence[JoinRow], console: Console) -> None:
    """Print the table and how to read it."""
    plan = planned.plan
    console.print(
        f"{plan.peers} donors, {amount(planned.parameters)} parameters, {plan.codec}, links of {plan.rate / 1e6:.3g} "
        f"Mbit/s (TCP {congestion_control()}); a state of {size(planned.state_bytes)}, which takes "
        f"{planned.line_seconds:.1f} s of the line.\nA step takes {1e3 * plan.step_seconds:g} ms, mostly sleep, as "
        "while a GPU works. Seconds count from the start of the newcomer's process.\n",
        highlight=False,
        markup=False,
    )
    console.print(table_of(rows))


def table_of(rows: Sequence[JoinRow]) -> Table:
    """One column for each newcomer."""
    return transposed_table(
        "Joining",
        rows,
        "a newcomer that starts",
        lambda row: f"at step {int(row.at * row.round_steps)} of {row.round_steps}",
    )
