"""One run on shaped links, joined by newcomers one after the other, each new to it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from psyche.bench.exchange.links import Link, Place, shaped
from psyche.bench.join.plan import BEFORE, SKIPPED, Trial
from psyche.bench.join.watch import Watch
from psyche.bench.swarm import own_config, running
from psyche.bench.utilisation.paced import PACE
from psyche.errors import PsycheError
from psyche.telemetry.events import Event, RoundStarted, StepDone

IMPORTS = 3
"""Times that importing is measured; the median counts."""


@dataclass(frozen=True)
class Joined:
    """One newcomer's way in."""

    at: float
    """When in a round it came, as the share of its inner steps that the donors had taken."""
    started: float
    """Unix seconds, when its process was started."""
    import_seconds: float
    """What importing alone takes on this machine, measured right after."""
    told: list[Event]
    """All that it said."""


def run(trial: Trial, folder: Path, say: Callable[[str], None]) -> tuple[list[Joined], list[list[Event]]]:
    """Play it; the newcomers, and all that each donor said. Raises :class:`PsycheError`."""
    plan = trial.plan
    donors = [f"node-{number}" for number in range(1, plan.peers + 1)]
    link = Link(plan.rate, plan.rate)
    watch, joined = Watch(folder), []
    with shaped([Link(), *[link] * (plan.peers + 1)]) as (office, *places), ExitStack() as stack:
        *spots, gate = places
        for name, place in zip(["coordinator", *donors], [office, *spots], strict=True):
            watch.add(name, stack.enter_context(_started(trial, name, place, folder)))
        say(f"waiting for the first round of {plan.inner_steps} steps to end")
        watch.until(lambda: watch.rounds >= SKIPPED)
        for number, at in enumerate(plan.at, 1):
            joined.append(_join(trial, f"newcomer-{number}", gate, folder, watch, at, say))
    return joined, [watch.events[name] for name in donors]


def _join(
    trial: Trial,
    name: str,
    place: Place,
    folder: Path,
    watch: Watch,
    at: float,
    say: Callable[[str], None],
) -> Joined:
    """A newcomer after ``BEFORE`` rounds without one; it goes once it has taken a step of a round."""
    first = watch.rounds + 1  # the one that is open may have lost the newcomer before
    say(f"rounds without a newcomer: {first + 1} to {first + BEFORE}")
    watch.until(lambda: watch.rounds >= first + BEFORE)
    round_number, steps = first + BEFORE + 1, round_steps(trial, at)
    watch.until(lambda: _reached(watch, round_number, steps))
    say(f"a newcomer comes in round {round_number}, after {steps} of {trial.plan.inner_steps} steps")
    started = time.time()
    with _started(trial, name, place, folder) as process:
        watch.add(name, process)
        watch.until(lambda: bool(watch.of(name, StepDone)))
        told = watch.drop(name)
    # Now, in a round that does not count, and soon enough for the machine to be as busy as it was.
    import_seconds = median(_import_seconds() for _ in range(IMPORTS))
    say(f"it is there; importing alone takes {import_seconds:.1f} s")
    return Joined(at, started, import_seconds, told)


def round_steps(trial: Trial, at: float) -> int:
    """Inner steps after which a newcomer comes."""
    return min(int(at * trial.plan.inner_steps), trial.plan.inner_steps - 1)


def _reached(watch: Watch, round_number: int, steps: int) -> bool:
    """Whether the first donor has begun the round and taken that many steps of it."""
    if not steps:
        return any(event.round == round_number for event in watch.of("node-1", RoundStarted))
    return any(event.round == round_number and event.step >= steps for event in watch.of("node-1", StepDone))


def _started(trial: Trial, name: str, place: Place, folder: Path) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """A process of the run, gone when the block is left."""
    node = trial.config.node
    if name.startswith("newcomer"):
        # It has none of the text either; and of so young a run it would take the rounds again, not fetch the state.
        own = {"cache": folder / f"{name}-cache", "checkpoint_every": 1, "checkpoints_kept": 1}
        node = node.model_copy(update=own)
    config = own_config(trial.config.model_copy(update={"node": node}), place, folder / f"{name}.yaml")
    where = ["--directory", str(folder / name)]
    if name == "coordinator":
        arguments = ["psyche", "coordinator", str(config), *where]
    else:
        invite = f"@{folder / 'coordinator' / 'invite'}"
        arguments = ["psyche.bench.utilisation.paced", invite, *where, "--config", str(config)]
    return running(name, place, arguments, folder, {PACE: str(trial.plan.step_seconds)})


def _import_seconds() -> float:
    """From starting a process to its having imported what a node needs."""
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "psyche.bench.join.imports"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise PsycheError(f"what a node needs cannot be imported: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout) - began
