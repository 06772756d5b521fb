"""One whole run on shaped links: the ordinary commands, each in its place, watched until the run is finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from psyche.bench.exchange.links import Link, Place, shaped
from psyche.bench.exchange.reap import reap
from psyche.bench.utilisation.paced import PACE
from psyche.bench.utilisation.plan import Trial
from psyche.config import Config
from psyche.data.durable import write_durably
from psyche.errors import PsycheError
from psyche.telemetry.events import LOG_NAME, Notice, RunFinished
from psyche.telemetry.follow import EventFollower

POLL_SECONDS = 0.2
STOP_SECONDS = 10.0
PATIENCE = 300.0
"""Seconds without any event of the coordinator after which the run counts as hung."""


def run(trial: Trial, folder: Path) -> tuple[Path, list[Path]]:
    """Run ``trial`` to its end; the event logs of the coordinator and of each node. Raises :class:`PsycheError`."""
    peers = trial.config.run.rounds.start_members
    names = ["coordinator", *(f"node-{number}" for number in range(1, peers + 1))]
    links = [Link(), *[Link(trial.rate, trial.rate)] * peers]
    with shaped(links) as places, ExitStack() as stack:
        processes = {}
        for name, place in zip(names, places, strict=True):
            arguments = _arguments(name, folder, _own_config(trial.config, place, folder / f"{name}.yaml"))
            processes[name] = stack.enter_context(_running(name, place, arguments, folder, trial.step_seconds))
        _follow(processes, folder)
    logs = [folder / name / LOG_NAME for name in names]
    return logs[0], logs[1:]


def _arguments(name: str, folder: Path, config: Path) -> list[str]:
    place = ["--directory", str(folder / name)]
    if name == "coordinator":
        return ["psyche", "coordinator", str(config), *place]
    invite = f"@{folder / 'coordinator' / 'invite'}"
    return ["psyche.bench.utilisation.paced", invite, *place, "--config", str(config)]


def _own_config(config: Config, place: Place, path: Path) -> Path:
    """The configuration with a place's own address; JSON is YAML."""
    node = config.node.model_copy(update={"listen": (f"/ip4/{place.address}/tcp/0",)})
    changed = config.model_copy(update={"node": node})
    write_durably(path, json.dumps(changed.model_dump(mode="json")).encode())
    return path


@contextmanager
def _running(
    name: str, place: Place, arguments: Sequence[str], folder: Path, step_seconds: float
) -> Iterator[subprocess.Popen[bytes]]:
    """``python -m`` something at ``place``, gone when the block is left."""
    environment = os.environ | {"PSYCHE_PARENT": str(os.getpid()), PACE: str(step_seconds)}
    with (folder / f"{name}.log").open("wb") as output:
        process = subprocess.Popen(
            place.command([sys.executable, "-m", *arguments]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        reap(process, time.monotonic() + STOP_SECONDS)


def _follow(processes: dict[str, subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait until every node has finished the run. Raises :class:`PsycheError` where that cannot happen."""
    followers = {name: EventFollower(folder / name / LOG_NAME) for name in processes}
    waiting = set(processes) - {"coordinator"}
    heard = time.monotonic()
    while waiting:
        ended = {name for name, process in processes.items() if process.poll() is not None}
        for name, follower in followers.items():
            for event in follower.new():
                heard = time.monotonic()
                if isinstance(event, RunFinished):
                    waiting.discard(name)
                elif isinstance(event, Notice) and event.level != "info":
                    print(f"{name}: {event.text}", file=sys.stderr, flush=True)
        if lost := sorted(ended & waiting):
            raise PsycheError(f"{lost[0]} ended: {_last_words(folder / f'{lost[0]}.log')}")
        if "coordinator" in ended and waiting:
            raise PsycheError(f"the coordinator ended: {_last_words(folder / 'coordinator.log')}")
        if time.monotonic() - heard > PATIENCE:
            raise PsycheError(f"nothing happened for {PATIENCE:g} s in the run with overlap in {folder}")
        time.sleep(POLL_SECONDS)


def _last_words(output: Path) -> str:
    lines = output.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    return lines[-1].removeprefix("psyche: ")
