"""A whole run on one machine: one process for the coordinator, one for each node, and a look at all of them.

The processes are those that would run anywhere else, started by the same commands, each with its own identity;
they find each other through the DHT. Only the view and the final report are made here, from the coordinator's log.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from psyche.config import Config, load_config
from psyche.durable import write_durably
from psyche.errors import PsycheError
from psyche.telemetry.event_log import LOG_NAME, EventFollower, read_events
from psyche.telemetry.events import Event, Notice, RoundStarted, RunFinished
from psyche.telemetry.view import SwarmView, live

COORDINATOR = "coordinator"
POLL_SECONDS = 0.2
STOP_SECONDS = 10.0
"""What a process has for its goodbyes before it is killed."""
MARKER = ".psyche-run"
"""In a directory that a run made, and that a fresh run may therefore empty."""


@dataclass
class Child:
    """A process of the run, and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    output: Path


def run_locally(config_path: Path, peers: int | None, directory: Path, *, fresh: bool, report: bool) -> None:
    """Run coordinator and ``peers`` nodes to the end of the run, then report. Raises ``PsycheError``.

    ``fresh`` empties the directory first; otherwise a run found there goes on. Every child is gone afterwards,
    however this ends.
    """
    config = load_config(config_path)
    _claim(directory, fresh)
    if peers is not None and fresh:
        config_path, config = _with_peers(config, peers, directory)
    count = config.run.rounds.start_members if peers is None else peers
    started = time.time()
    view = SwarmView()
    with live(view) as listener, _children() as children:
        command = ["coordinator", str(config_path), "--directory", str(directory / COORDINATOR)]
        children.append(_start(COORDINATOR, command, directory))
        for number in range(1, count + 1):
            invite = f"@{directory / COORDINATOR / 'invite'}"
            place = ["--directory", str(directory / f"node-{number}"), "--config", str(config_path)]
            children.append(_start(f"node-{number}", ["join", invite, *place], directory))
        _follow(children, directory / COORDINATOR / LOG_NAME, listener)
        _wait_for(children)
    if report:
        _report(config, directory, time.time() - started)


# ----------------------------------------------------------------------------------------- processes


def _start(name: str, arguments: list[str], directory: Path) -> Child:
    output = directory / f"{name}.log"
    environment = os.environ | {"PSYCHE_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    with output.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "psyche", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # the terminal's Ctrl-C is ours to pass on, once
        )
    return Child(name, process, output)


@contextmanager
def _children() -> Iterator[list[Child]]:
    """A list of children that are ended, politely and then not, when the block is left."""
    children: list[Child] = []
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield children
    finally:
        signal.signal(signal.SIGTERM, previous)
        for child in children:
            if child.process.poll() is None:
                child.process.terminate()  # not Ctrl-C's signal: without the coordinator no round can be finished
        deadline = time.monotonic() + STOP_SECONDS
        for child in children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _follow(children: list[Child], log: Path, listener: Callable[[Event], None]) -> None:
    """Show the coordinator's events as they come, until the run is finished. Raises where that cannot happen."""
    follower = EventFollower(log)
    coordinator, nodes = children[0], children[1:]
    training = False
    while True:
        ended = coordinator.process.poll() is not None  # asked first: what it wrote before it ended is then read
        for event in follower.new():
            listener(event)
            training |= isinstance(event, RoundStarted)
            if isinstance(event, RunFinished):
                return
        if ended:
            raise PsycheError(_last_words(coordinator))
        for node in [node for node in nodes if node.process.poll() not in (None, 0)]:
            nodes.remove(node)
            if not training or not nodes:  # the others would wait for it, or there are none
                raise PsycheError(_last_words(node))
            listener(Notice(level="warning", text=f"{_last_words(node)}; the others go on"))
        time.sleep(POLL_SECONDS)


def _wait_for(children: list[Child]) -> None:
    """Nodes write their last checkpoint and leave; the coordinator goes when they have."""
    for child in [*children[1:], children[0]]:
        try:
            child.process.wait(60.0)
        except subprocess.TimeoutExpired:
            return  # _children ends it


def _last_words(child: Child) -> str:
    lines = child.output.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    words = lines[-1].removeprefix("psyche: ")
    return f"{child.name} ended with code {child.process.returncode}: {words} (all of its output: {child.output})"


# --------------------------------------------------------------------------------------- directories


def _claim(directory: Path, fresh: bool) -> None:
    """Make the run's directory, emptied if ``fresh``; never one that holds something else."""
    marker = directory / MARKER
    if fresh and directory.exists() and any(directory.iterdir()):
        if not marker.exists():
            raise PsycheError(f"{directory} is not a run's directory and not empty; choose another --directory")
        shutil.rmtree(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise PsycheError(f"cannot use {directory}: {error.strerror}; choose another --directory") from None


def _with_peers(config: Config, peers: int, directory: Path) -> tuple[Path, Config]:
    """The configuration with ``peers`` nodes to start with, written into the run's directory."""
    rounds = config.run.rounds.model_copy(update={"start_members": peers})
    run = config.run.model_copy(update={"rounds": rounds})
    changed = config.model_copy(update={"run": run})
    path = directory / "config.yaml"
    # JSON is YAML; what a person reads is the file they wrote
    write_durably(path, json.dumps(changed.model_dump(mode="json"), indent=2).encode())
    return path, load_config(path)


# -------------------------------------------------------------------------------------------- report


def _report(config: Config, directory: Path, seconds: float) -> None:
    """report.json, the loss plot, the exported model and a sample of it; then a summary for people."""
    from rich.console import Console

    from psyche.telemetry.run_report import build_report, plot_loss, render_summary
    from psyche.tools.export import export_node
    from psyche.tools.exported_model import sample

    log = list(read_events(directory / COORDINATOR / LOG_NAME))
    nodes = sorted(path for path in directory.glob("node-*") if path.is_dir())
    report = build_report(log) | {"seconds": round(seconds, 1)}
    write_durably(directory / "report.json", json.dumps(report, indent=2).encode())
    plot_loss(log, directory / "loss.png")
    export_node(nodes[0], directory / "model", config.node.cache)
    console = Console()
    console.print(render_summary(report))
    text = sample(directory / "model", "def ")
    console.print(f"[bold]a sample of {directory / 'model'}[/bold] (prompt: 'def ')")
    console.print(text, markup=False, highlight=False)
    console.print(f"\nreport {directory / 'report.json'}   loss plot {directory / 'loss.png'}")
