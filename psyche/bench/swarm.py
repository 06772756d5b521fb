"""Processes of a run that a bench starts: the ordinary commands, each in a place of its own, ended with the bench."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from psyche.bench.exchange.links import Place
from psyche.bench.exchange.reap import reap
from psyche.config import Config
from psyche.durable import write_durably
from psyche.errors import PsycheError
from psyche.telemetry.event_log import LOG_NAME, EventFollower
from psyche.telemetry.events import Notice, RunFinished

STOP_SECONDS = 10.0
POLL_SECONDS = 0.2
PATIENCE = 300.0
"""Seconds without any event after which a run counts as hung."""


def own_config(config: Config, place: Place, path: Path) -> Path:
    """Write ``config`` with a place's own address to ``path``; JSON is YAML."""
    node = config.node.model_copy(update={"listen": (f"/ip4/{place.address}/tcp/0",)})
    changed = config.model_copy(update={"node": node})
    write_durably(path, json.dumps(changed.model_dump(mode="json")).encode())
    return path


@contextmanager
def running(
    name: str, place: Place, arguments: Sequence[str], folder: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """``python -m`` something at ``place``, its output in ``folder/name.log``; gone when the block is left."""
    with (folder / f"{name}.log").open("wb") as output:
        process = subprocess.Popen(
            place.command([sys.executable, "-m", *arguments]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PSYCHE_PARENT": str(os.getpid())} | environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        reap(process, time.monotonic() + STOP_SECONDS)


def last_words(output: Path) -> str:
    """What a process that has ended said last."""
    lines = output.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    return lines[-1].removeprefix("psyche: ")


def until_finished(processes: Mapping[str, subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait until every node has finished the run; ``coordinator`` is the name of who leads it.

    Raises :class:`PsycheError` where that cannot happen.
    """
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
            raise PsycheError(f"{lost[0]} ended: {last_words(folder / f'{lost[0]}.log')}")
        if "coordinator" in ended and waiting:
            raise PsycheError(f"the coordinator ended: {last_words(folder / 'coordinator.log')}")
        if time.monotonic() - heard > PATIENCE:
            raise PsycheError(f"nothing happened for {PATIENCE:g} s in the run in {folder}")
        time.sleep(POLL_SECONDS)
