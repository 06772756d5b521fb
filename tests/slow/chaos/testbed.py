"""The processes of a run, each with its own network namespace, disk and clock, and the faults that can hit them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from psyche.bench.harness.shaped_links import Link, Place, on_loopback, shaped
from psyche.errors import PsycheError
from psyche.network.invite import invite_from
from tests.processes.swarm import Swarm
from tests.slow.chaos import clock
from tests.slow.chaos.clock import Clock
from tests.slow.chaos.disk import Disk

COORDINATOR = "coordinator"
DISK_BYTES = 64 << 20
HALF = "half"
"""The second bridge, to which one half of a partition is moved."""


@dataclass(frozen=True)
class Host:
    """The environment of one process. Without a disk or a clock it uses the machine's."""

    place: Place
    disk: Disk | None
    clock: Clock | None


class Testbed(Swarm):
    """A swarm in which every process has a :class:`Host`. ``config`` must be set before any process starts."""

    def __init__(
        self, directory: Path, hosts: dict[str, Host], standbys: Sequence[str], without_data: Sequence[str]
    ) -> None:
        """``without_data``: nodes that start with an empty data cache."""
        super().__init__(directory, directory)
        self.hosts, self._standbys, self._without_data = hosts, standbys, without_data
        self.frozen: set[str] = set()

    def begin(self, name: str) -> None:
        """Start or restart ``name`` in its role."""
        place, config = ["--directory", str(self.directory / name)], str(self._config_of(name))
        if name == COORDINATOR:
            self.start(name, "coordinator", config, *place)
        elif name in self._standbys:
            self.start(name, "coordinator", config, "--standby", self._invite_of(name), *place)
        else:
            self.start(name, "join", self._invite_of(name), *place, "--config", config)

    def command(self, name: str, arguments: list[str]) -> list[str]:
        return self.hosts[name].place.command(arguments)

    def environment(self, name: str) -> dict[str, str]:
        own = self.hosts[name].clock
        return own.environment if own else {}

    def end(self) -> None:
        """Kill and reap all processes."""
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait()

    # -------------------------------------------------------------------------------------- faults

    def freeze(self, name: str) -> None:
        os.kill(self.processes[name].pid, signal.SIGSTOP)
        self.frozen.add(name)

    def thaw(self, name: str) -> None:
        self.frozen.discard(name)
        if name in self.processes:
            os.kill(self.processes[name].pid, signal.SIGCONT)

    def cut(self, name: str) -> None:
        """Cut all traffic to and from ``name``."""
        self._set_port(name, "down")

    def fill(self, name: str) -> None:
        """Fill the disk of ``name``."""
        if disk := self.hosts[name].disk:
            disk.fill()

    def free(self, name: str) -> None:
        if disk := self.hosts[name].disk:
            disk.free()

    def set_clock(self, name: str, seconds: float) -> None:
        """Set the clock of ``name`` ``seconds`` ahead."""
        if own := self.hosts[name].clock:
            own.set(seconds)

    def heal(self, name: str) -> None:
        self._set_port(name, "up")

    def part(self, names: Sequence[str]) -> None:
        """Partition the network: ``names`` reach only each other, and so do the others."""
        for name in names:
            self._set_port(name, "master", HALF)

    def unite(self) -> None:
        for name in self.hosts:
            self._set_port(name, "master", "hub")

    def _set_port(self, name: str, *state: str) -> None:
        place = self.hosts[name].place
        _ip("-n", place.hub, "link", "set", place.port, *state)

    # -------------------------------------------------------------------------------------- helpers

    def _config_of(self, name: str) -> Path:
        """Write the run's configuration with this process's own address."""
        tree = yaml.safe_load(self.config.read_text())
        tree["node"]["listen"] = [f"/ip4/{self.hosts[name].place.address}/tcp/0"]
        if name in self._without_data:
            tree["node"]["cache"] = str(self.directory / name / "cache")
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def _invite_of(self, name: str) -> str:
        """Return the operator's invite, or for a new node without data one from a running member."""
        if name in self._without_data and not (self.directory / name / "peers.json").exists():
            for member in sorted(self.processes):
                with contextlib.suppress(PsycheError):
                    return invite_from(self.directory / member).encode()
        return f"@{self.directory / COORDINATOR / 'invite'}"


def missing_requirement() -> str | None:
    """Return why this machine cannot host a testbed, or None."""
    if os.geteuid() != 0:
        return "namespaces and mounts need root"
    if clock.compiler() is None:
        return "clocks need a C++ compiler"
    try:
        with shaped([Link()]):
            return None
    except PsycheError as error:
        return str(error)


@contextlib.contextmanager
def make_testbed(
    directory: Path,
    names: Sequence[str],
    *,
    standbys: Sequence[str] = (),
    without_data: Sequence[str] = (),
    plain: bool = False,
) -> Iterator[Testbed]:
    """Yield a testbed for processes of these ``names``; only their logs remain afterwards.

    ``plain``: use the machine's network, disk and clock, and leave them alone.
    """
    directory.mkdir(parents=True)
    with contextlib.ExitStack() as undo:
        hosts = _plain_hosts(names) if plain else _isolated_hosts(directory, names, undo)
        running = Testbed(directory, hosts, standbys, without_data)
        undo.callback(running.end)
        yield running


def _plain_hosts(names: Sequence[str]) -> dict[str, Host]:
    return {name: Host(place, None, None) for name, place in zip(names, on_loopback(len(names)), strict=True)}


def _isolated_hosts(directory: Path, names: Sequence[str], undo: contextlib.ExitStack) -> dict[str, Host]:
    library = clock.build(directory)
    places = undo.enter_context(shaped([Link()] * len(names)))
    _ip("-n", places[0].hub, "link", "add", HALF, "type", "bridge")
    _ip("-n", places[0].hub, "link", "set", HALF, "up")
    hosts = {}
    for name, place in zip(names, places, strict=True):
        disk = Disk(directory / name, DISK_BYTES)
        undo.callback(disk.close)
        hosts[name] = Host(place, disk, Clock(directory / f"{name}.clock", library))
    return hosts


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
