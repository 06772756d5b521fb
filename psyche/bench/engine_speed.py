"""Compare tokens/s of a node in a run, its engine alone, a plain PyTorch loop and ``transformers.Trainer``.

The ways take turns in every repeat, each in its own process, and are compared within a repeat: the reported ratio is
the median of the repeats' ratios.
"""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import msgspec
from rich.console import Console

from psyche.bench.harness.child_processes import STOP_SECONDS, last_line, reap, spawn
from psyche.bench.harness.node_runs import run_nodes
from psyche.bench.harness.rows import Column, Row, run_bench, table, thousands
from psyche.bench.harness.shaped_links import on_loopback
from psyche.bench.harness.turns import say, take_turns
from psyche.bench.utilisation import counted_metrics, train_and_round_seconds
from psyche.config import Config, Rounds, Run, Wandb, load_config
from psyche.data.prepare import Report, prepare
from psyche.errors import PsycheError
from psyche.telemetry.formatting import amount
from psyche.training.models import layout

Way = Literal["loop", "trainer", "engine", "node"]
WAYS: dict[Way, str] = {
    "loop": "plain PyTorch loop",
    "trainer": "transformers.Trainer",
    "engine": "psyche's engine alone",
    "node": "psyche node in a run",
}
WARM_UP = 5
"""Steps that do not count: memory is allocated and caches are filled."""
SKIPPED, COUNTED = 1, 1
"""Rounds of a node's run that do not count, and rounds that do."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure. The measuring processes receive it as JSON."""

    config: str
    """File of a run to take model, data and batch from."""
    steps: int = 40
    """Steps that count, of each way in each repeat."""
    repeats: int = 5
    threads: int = 1
    device: str = "cpu"

    def load(self) -> Config:
        """Load the configuration, for the device and threads of this plan. Raises ``PsycheError``."""
        config = load_config(Path(self.config))
        changes = {"device": self.device, "threads": self.threads}
        return config.model_copy(update={"node": config.node.model_copy(update=changes)})


class EngineRow(Row, frozen=True):
    """One way in one repeat."""

    way: Annotated[Way, Column("way", WAYS.__getitem__, left=True)]
    repeat: int
    step_seconds: Annotated[float, Column("ms a step", fold=lambda values: f"{1e3 * median(values):.1f}")]
    tokens_per_second: Annotated[float, Column("tokens/s", fold=lambda values: thousands(median(values)))]
    against_loop: Annotated[float, Column("of the loop", fold=lambda values: f"{100 * median(values):.1f} %")]
    """tokens/s over those of the plain loop in the same repeat."""

    @property
    def least(self) -> Annotated[float, Column("least", fold=lambda values: f"{100 * min(values):.1f} %")]:
        return self.against_loop

    @property
    def most(self) -> Annotated[float, Column("most", fold=lambda values: f"{100 * max(values):.1f} %")]:
        return self.against_loop


def main(json: Path | None, plan: Plan, preparing: Callable[[], AbstractContextManager[Report | None]]) -> None:
    """Run ``psyche bench engine``; ``preparing`` shows the preparation of the corpus. Raises ``PsycheError``."""
    config = plan.load()
    with preparing() as report:
        prepare(
            config.run.data, config.node.cache.expanduser(), vocab_limit=config.run.model.vocab_size, progress=report
        )
    run_bench(
        json,
        lambda: measure(plan, config.run, available()),
        list,
        lambda rows, console: show(plan, config.run, rows, console),
    )


def available() -> list[Way]:
    """Return the ways that work here: the Trainer needs accelerate."""
    if importlib.util.find_spec("accelerate") is not None:
        return list(WAYS)
    say("transformers.Trainer is left out: it needs accelerate (make bench-engine installs it)")
    return [way for way in WAYS if way != "trainer"]


def measure(plan: Plan, run: Run, ways: Sequence[Way]) -> list[EngineRow]:
    """Measure every way in every repeat. Raises :class:`PsycheError`."""

    def timed(way: Way, repeat: int) -> float:
        seconds = seconds_per_step(plan, way)
        say(f"{repeat + 1}/{plan.repeats} {way:8} {run.tokens_per_step / seconds:,.0f} tokens/s")
        return seconds

    found = take_turns(ways, range(plan.repeats), timed)
    return [
        EngineRow(
            way=way,
            repeat=repeat,
            step_seconds=found[way][repeat],
            tokens_per_second=run.tokens_per_step / found[way][repeat],
            against_loop=found["loop"][repeat] / found[way][repeat],
        )
        for repeat in range(plan.repeats)
        for way in ways
    ]


def seconds_per_step(plan: Plan, way: Way) -> float:
    """Mean duration of the inner steps that count. Raises :class:`PsycheError`."""
    with tempfile.TemporaryDirectory(prefix="psyche-bench-") as name:
        folder = Path(name)
        return _node(plan, folder) if way == "node" else _alone(plan, way, folder)


def _alone(plan: Plan, way: Way, folder: Path) -> float:
    """Measure a way of :mod:`psyche.bench.training_loops`."""
    (here,), log = on_loopback(1), folder / "log"
    command = ["psyche.bench.training_loops", way]
    threads = {"OMP_NUM_THREADS": str(plan.threads)}
    process = spawn(command, here, log, environment=threads, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        output, _ = process.communicate(msgspec.json.encode(plan))
    finally:
        reap(process, time.monotonic() + STOP_SECONDS)
    if process.returncode != 0:
        raise PsycheError(f"training by {way} failed: {last_line(log)}")
    return float(output) / plan.steps


def _node(plan: Plan, folder: Path) -> float:
    """Measure a node in a run of its own, with a coordinator that polls, certifies and logs as always."""
    config = plan.load()
    rounds = Rounds(total=SKIPPED + COUNTED, inner_steps=plan.steps)
    run = config.run.model_copy(update={"name": "engine", "rounds": rounds})
    node = config.node.model_copy(update={"wandb": Wandb(mode="disabled")})
    config = config.model_copy(update={"run": run, "node": node})
    _, (log,) = run_nodes(on_loopback(2), config, [None], folder)
    counted = counted_metrics("node-1", log, range(SKIPPED + 1, SKIPPED + COUNTED + 1))
    return train_and_round_seconds(counted)[0] / sum(one.inner_steps or 0 for one in counted)


def show(plan: Plan, run: Run, rows: Sequence[EngineRow], console: Console) -> None:
    """Print the table, medians over the repeats, and how to read it."""
    console.print(
        f"{amount(layout(run.model).parameters)} parameters, batches of {run.inner.batch_size} × "
        f"{run.data.sequence_length} tokens, {plan.device}, {plan.threads} threads, {plan.steps} steps in each of "
        f"{plan.repeats} repeats. A node's rate is that of its inner steps; psyche bench utilisation measures the rest "
        "of a round.",
        highlight=False,
    )
    in_order = sorted(rows, key=lambda row: list(WAYS).index(row.way))
    console.print(table("Tokens per second", in_order, group=lambda row: row.way))
