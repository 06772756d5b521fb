"""Whole runs of the ordinary commands, each process in a place of its own and observed through its event log."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TypeVar

from psyche.bench.harness.child_processes import last_line, running
from psyche.bench.harness.paced_engine import PACE
from psyche.bench.harness.shaped_links import Place
from psyche.bench.harness.turns import say
from psyche.config import BpeTokenizer, Config, Data, Inner, Model, Node, Run, Wandb
from psyche.config.run_config import Audits
from psyche.durable import write_durably
from psyche.errors import PsycheError
from psyche.telemetry.event_log import LOG_NAME, EventFollower
from psyche.telemetry.events import Event, Notice, RunFinished

POLL_SECONDS = 0.1
SILENCE_SECONDS = 300.0
"""A run without any event for so long counts as hung."""
COORDINATOR = "coordinator"

E = TypeVar("E", bound=Event)


def start(
    name: str, config: Config, place: Place, folder: Path, step_seconds: float | None = None
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """Start the coordinator, or a node that joins it, at ``place``; it ends with the block.

    ``folder/name`` is its directory, ``folder/name.log`` its output. With ``step_seconds`` the node trains with a
    :class:`~psyche.bench.harness.paced_engine.PacedEngine`.
    """
    node = config.node.model_copy(update={"listen": (f"/ip4/{place.address}/tcp/0",)})
    own = folder / f"{name}.yaml"  # JSON is YAML
    write_durably(own, json.dumps(config.model_copy(update={"node": node}).model_dump(mode="json")).encode())
    directory = ["--directory", str(folder / name)]
    if name == COORDINATOR:
        command = ["psyche", "coordinator", str(own), *directory]
    else:
        program = ["psyche", "join"] if step_seconds is None else ["psyche.bench.harness.paced_engine"]
        command = [*program, f"@{folder / COORDINATOR / 'invite'}", *directory, "--config", str(own)]
    environment = {} if step_seconds is None else {PACE: str(step_seconds)}
    return running(command, place, folder / f"{name}.log", environment)


def run_nodes(
    places: Sequence[Place], config: Config, step_seconds: Sequence[float | None], folder: Path
) -> tuple[Path, list[Path]]:
    """Run ``config`` to its end with one node for each of ``step_seconds``; the coordinator has the first place.

    Returns the event logs of the coordinator and of the nodes. Raises :class:`PsycheError` if the run fails.
    """
    nodes = [f"node-{number}" for number in range(1, len(step_seconds) + 1)]
    with ExitStack() as stack:
        watch = RunWatch(folder)
        for name, place, seconds in zip([COORDINATOR, *nodes], places, [None, *step_seconds], strict=True):
            watch.add(name, stack.enter_context(start(name, config, place, folder, seconds)))
        watch.until(lambda: all(watch.of(name, RunFinished) for name in nodes))
    return folder / COORDINATOR / LOG_NAME, [folder / name / LOG_NAME for name in nodes]


class RunWatch:
    """Collects the events of a run's processes and notices when one of them ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._followers: dict[str, EventFollower] = {}
        self.events: dict[str, list[Event]] = {}

    def add(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Watch ``process``, which must not end before its run has finished or :meth:`drop` is called."""
        self._processes[name] = process
        self._followers[name] = EventFollower(self._folder / name / LOG_NAME)
        self.events[name] = []

    def drop(self, name: str) -> list[Event]:
        """Stop watching a process, and return all its events."""
        del self._processes[name]
        self.events[name] += self._followers.pop(name).new()
        return self.events[name]

    def of(self, name: str, kind: type[E]) -> list[E]:
        """Return the events of one kind from process ``name``."""
        return [event for event in self.events[name] if isinstance(event, kind)]

    def until(self, done: Callable[[], bool]) -> None:
        """Wait until ``done``. Raises :class:`PsycheError` if a process ends or no event comes for too long."""
        heard = time.monotonic()
        while not done():
            time.sleep(POLL_SECONDS)
            ended = [name for name, process in self._processes.items() if process.poll() is not None]
            for name, follower in self._followers.items():
                for event in follower.new():
                    heard = time.monotonic()
                    self.events[name].append(event)
                    if isinstance(event, Notice) and event.level != "info":
                        say(f"{name}: {event.text}")
            lost = [name for name in ended if name == COORDINATOR or not self.of(name, RunFinished)]
            if lost and not done():
                raise PsycheError(f"{lost[0]} ended: {last_line(self._folder / f'{lost[0]}.log')}")
            if time.monotonic() - heard > SILENCE_SECONDS:
                raise PsycheError(f"no event for {SILENCE_SECONDS:g} s in the run in {self._folder}")


def llama(hidden: int, intermediate: int, layers: int, heads: int, **more: float) -> Model:
    """Return a Llama with a vocabulary of 512, 64 positions and tied embeddings; ``more`` are further settings."""
    settings: dict[str, float | bool] = {
        "vocab_size": 512,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return Model(settings=settings | more)


def small_config(name: str) -> Config:
    """Return a run of a Llama of 0.9M parameters: its payload is much larger than the control messages of an
    exchange."""
    run = Run(
        name=name,
        model=llama(128, 384, 4, 2),
        data=Data(tokenizer=BpeTokenizer(vocab_size=512), sequence_length=32),
        inner=Inner(lr=2e-3, batch_size=2, schedule="constant", warmup_steps=10),
        heldout_sequences=4,
        audits=Audits(rate=0.0),  # an auditor's steps are no training steps, and would be counted as idle time
    )
    return Config(run=run, node=Node(threads=1, device="cpu", wandb=Wandb(mode="disabled")))
