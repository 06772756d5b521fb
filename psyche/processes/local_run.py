"""A whole run on one machine: a process for the coordinator, one for each node, a live view and a report.

The processes are started by the same commands as on separate machines, with their own identities, and find each other
through the DHT. View and report are made here from the coordinator's log.
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

from rich.table import Table
from rich.text import Text

from psyche.config import Config, load_config
from psyche.durable import write_durably
from psyche.errors import PsycheError
from psyche.telemetry.event_log import LOG_NAME, EventFollower, read_events
from psyche.telemetry.events import Event, Notice, RoundStarted, RunFinished
from psyche.telemetry.view import SwarmView, live

COORDINATOR = "coordinator"
POLL_SECONDS = 0.2
STOP_SECONDS = 10.0
"""Time to shut down before a process is killed."""
PROMPTS = ("def get_", "class Test", "    def __init__(self, ", "import os\n")
"""What the exported model continues at the end, if the run trained on code; prompts for other data do no harm."""
FILES = {
    "model": "the trained model (transformers, safetensors)",
    "loss.png": "loss curves",
    "report.json": "the numbers above, all state roots",
    "*.log": "the output of each process",
}
MARKER = ".psyche-run"
"""File in a directory that a run created, which a fresh run may therefore empty."""


@dataclass
class Child:
    """A process of the run and the file of its output."""

    name: str
    process: subprocess.Popen[bytes]
    output: Path


def run_locally(config_path: Path, peers: int | None, directory: Path, *, fresh: bool, report: bool) -> None:
    """Run a coordinator and ``peers`` nodes to the end of the run, then report. Raises ``PsycheError``.

    ``fresh`` empties the directory first; otherwise a run found there is resumed. No child process outlives this call.
    """
    config = load_config(config_path)
    _create_directory(directory, fresh)
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
            start_new_session=True,  # Ctrl-C reaches only this process, which stops the others
        )
    return Child(name, process, output)


@contextmanager
def _children() -> Iterator[list[Child]]:
    """Yield a list of children that are terminated, and after STOP_SECONDS killed, at the end of the block."""
    children: list[Child] = []
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield children
    finally:
        signal.signal(signal.SIGTERM, previous)
        for child in children:
            if child.process.poll() is None:
                child.process.terminate()  # not SIGINT: a node would wait for a round that no coordinator closes
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
    """Show the coordinator's events until the run is finished. Raises ``PsycheError`` if it cannot finish."""
    follower = EventFollower(log)
    coordinator, nodes = children[0], children[1:]
    training = False
    while True:
        ended = coordinator.process.poll() is not None  # before reading the log, so that the last events are read
        for event in follower.new():
            listener(event)
            training |= isinstance(event, RoundStarted)
            if isinstance(event, RunFinished):
                return
        if ended:
            raise PsycheError(_exit_message(coordinator))
        for node in [node for node in nodes if node.process.poll() not in (None, 0)]:
            nodes.remove(node)
            if not training or not nodes:  # the run cannot start, or go on
                raise PsycheError(_exit_message(node))
            listener(Notice(level="warning", text=f"{_exit_message(node)}; the other nodes go on"))
        time.sleep(POLL_SECONDS)


def _wait_for(children: list[Child]) -> None:
    """Wait for the nodes to write their last checkpoint and leave, then for the coordinator."""
    for child in [*children[1:], children[0]]:
        try:
            child.process.wait(60.0)
        except subprocess.TimeoutExpired:
            return  # _children terminates it


def _exit_message(child: Child) -> str:
    lines = child.output.read_text(errors="replace").strip().splitlines() or ["no output"]
    last = lines[-1].removeprefix("psyche: ")
    return f"{child.name} ended with code {child.process.returncode}: {last} (full output: {child.output})"


# --------------------------------------------------------------------------------------- directories


def _create_directory(directory: Path, fresh: bool) -> None:
    """Create the run's directory, or empty it if ``fresh``; refuse one that holds other files."""
    marker = directory / MARKER
    if fresh and directory.exists() and any(directory.iterdir()):
        if not marker.exists():
            raise PsycheError(f"{directory} is not empty and was not created by psyche: choose another --directory")
        shutil.rmtree(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise PsycheError(f"cannot use {directory}: {error.strerror}; choose another --directory") from None


def _with_peers(config: Config, peers: int, directory: Path) -> tuple[Path, Config]:
    """Write the configuration with ``peers`` start members into the run's directory; return its path and content."""
    rounds = config.run.rounds.model_copy(update={"start_members": peers})
    run = config.run.model_copy(update={"rounds": rounds})
    changed = config.model_copy(update={"run": run})
    path = directory / "config.yaml"
    # JSON is valid YAML
    write_durably(path, json.dumps(changed.model_dump(mode="json"), indent=2).encode())
    return path, load_config(path)


# -------------------------------------------------------------------------------------------- report


def _report(config: Config, directory: Path, seconds: float) -> None:
    """Write report.json, the loss plot and the exported model; print a summary and a sample of the model."""
    from rich.console import Console
    from rich.rule import Rule

    from psyche.telemetry.run_report import build_report, plot_loss, render_summary
    from psyche.tools.exported_model import sample
    from psyche.tools.load import export_node

    log = list(read_events(directory / COORDINATOR / LOG_NAME))
    nodes = sorted(path for path in directory.glob("node-*") if path.is_dir())
    report = build_report(log) | {"seconds": round(seconds, 1)}
    write_durably(directory / "report.json", json.dumps(report, indent=2).encode())
    plot_loss(log, directory / "loss.png")
    export_node(nodes[0], directory / "model", config.node.cache)
    console = Console()
    console.print(render_summary(report))
    console.print("\n[bold]What the trained model writes[/bold] (prompts in bold, temperature 0.5)")
    for prompt, text in zip(PROMPTS, sample(directory / "model", PROMPTS), strict=True):
        console.print(Rule(style="dim"), Text(prompt, style="bold") + Text(text.rstrip()))
    console.print(Rule(style="dim"))
    console.print("\n[bold]Files[/bold]", _columns({str(directory / path): what for path, what in FILES.items()}))
    commands = {
        f'psyche generate {directory / "model"} "def "': "continue another prompt",
        f"psyche ledger show {nodes[0]}": "contributions, audits",
        "psyche run CONFIG.yaml": "train with others",
    }
    console.print("\n[bold]Next[/bold]", _columns(commands))


def _columns(rows: dict[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    for left, right in rows.items():
        grid.add_row(Text(left), right)
    return grid
