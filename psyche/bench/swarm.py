"""Processes of a run that a bench starts: the ordinary commands, each in a place of its own, ended with the bench."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from psyche.bench.exchange.links import Place
from psyche.bench.exchange.reap import reap
from psyche.config import Config
from psyche.durable import write_durably

STOP_SECONDS = 10.0


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
