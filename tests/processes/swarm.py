"""Real processes of a run: start them, watch their event logs, kill and reap them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from psyche.network.identity import IDENTITY, Identity
from psyche.telemetry.event_log import LOG_NAME, read_events
from psyche.telemetry.events import Event

E = TypeVar("E", bound=Event)

PATIENCE = 120.0
"""Seconds after which a wait counts as a hang: a guard, not a measurement."""


class Swarm:
    """The processes of one run in ``directory``, each with a folder of its name."""

    def __init__(self, directory: Path, config: Path) -> None:
        self.directory, self.config = directory, config
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def coordinator(self) -> None:
        self.start("coordinator", "coordinator", str(self.config), "--directory", str(self.directory / "coordinator"))

    def standby(self, name: str) -> None:
        """Start a standby; the configuration names its key, made by :func:`standby_key`."""
        invite = f"@{self.directory / 'coordinator' / 'invite'}"
        place = ["--directory", str(self.directory / name)]
        self.start(name, "coordinator", str(self.config), "--standby", invite, *place)

    def node(self, name: str, *arguments: str, module: str = "psyche", config: Path | None = None) -> None:
        """Start ``psyche join``, or a test ``module`` that wraps it and takes ``arguments``."""
        invite = f"@{self.directory / 'coordinator' / 'invite'}"
        place = ["--directory", str(self.directory / name), "--config", str(config or self.config)]
        command = ["join"] if module == "psyche" else arguments
        self.start(name, *command, invite, *place, module=module)

    def start(self, name: str, *arguments: str, module: str = "psyche") -> None:
        """Start a psyche command, or ``module``; its output goes to ``name``.log."""
        with (self.directory / f"{name}.log").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                self.command(name, [sys.executable, "-m", module, *arguments]),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_inherited() | {"PSYCHE_PARENT": str(os.getpid())} | self.environment(name),
                start_new_session=True,
            )

    def command(self, name: str, arguments: list[str]) -> list[str]:
        """Return the command that runs ``arguments`` in the environment of ``name``."""
        return arguments

    def environment(self, name: str) -> dict[str, str]:
        """Return additional environment variables of ``name``."""
        return {}

    def output(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def events(self, name: str, kind: type[E]) -> list[E]:
        log = self.directory / name / LOG_NAME
        return [event for event in read_events(log) if isinstance(event, kind)] if log.exists() else []

    def wait(self, name: str, kind: type[E], wanted: Callable[[E], bool] = lambda event: True) -> E:
        """Return the first event of that kind in ``name``'s log that satisfies ``wanted``."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for event in self.events(name, kind):
                if wanted(event):
                    return event
            if self.processes[name].poll() not in (None, 0):
                raise AssertionError(f"{name} ended: {self.output(name)[-2000:]}")
            time.sleep(0.1)
        raise AssertionError(f"no {kind.__name__} from {name}: {self.output(name)[-2000:]}")

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send a signal, reap the process and return its exit code."""
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(PATIENCE)

    def cut_power(self) -> None:
        """Kill all processes at once and delete the invite, so that restarted nodes wait for a new one."""
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait(PATIENCE)
        self.processes.clear()
        (self.directory / "coordinator" / "invite").unlink()

    def join(self, name: str) -> int:
        """Wait for a process to end and return its exit code."""
        return self.processes.pop(name).wait(PATIENCE)


def _inherited() -> dict[str, str]:
    """Return this process's environment without the address of a W&B helper started by another test."""
    return {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}


def standby_key(directory: Path) -> str:
    """Create the key of the standby in ``directory`` and return its PeerID."""
    directory.mkdir(parents=True, exist_ok=True)
    return Identity.load_or_create(directory / IDENTITY).peer_id


@contextmanager
def swarm(directory: Path, config: Path) -> Iterator[Swarm]:
    """Yield a swarm; its processes are killed afterwards."""
    directory.mkdir(parents=True, exist_ok=True)
    running = Swarm(directory, config)
    try:
        yield running
    finally:
        for process in running.processes.values():
            process.kill()
        for process in running.processes.values():
            process.wait()


def descendants(pid: int) -> set[int]:
    """Return the pids of all processes below ``pid``."""
    found: set[int] = set()
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    frontier = {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier} - found
        found |= frontier
    return found


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
