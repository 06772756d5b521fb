"""The processes of a run, each in a namespace, on a disk and by a clock of its own, and what can befall them."""

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
class Spot:
    """Where one process lives. Without a disk or a clock it uses the machine's."""

    place: Place
    disk: Disk | None
    clock: Clock | None


class World(Swarm):
    """A swarm in which everybody has a :class:`Spot`. ``config`` is set before anybody is begun."""

    def __init__(
        self, directory: Path, spots: dict[str, Spot], standbys: Sequence[str], strangers: Sequence[str]
    ) -> None:
        """``strangers`` have no text of the run to begin with."""
        super().__init__(directory, directory)
        self.spots, self._standbys, self._strangers = spots, standbys, strangers
        self.frozen: set[str] = set()

    def begin(self, name: str) -> None:
        """Start what ``name`` is, for the first time or again."""
        place, config = ["--directory", str(self.directory / name)], str(self._config_of(name))
        if name == COORDINATOR:
            self.start(name, "coordinator", config, *place)
        elif name in self._standbys:
            self.start(name, "coordinator", config, "--standby", self._invite_of(name), *place)
        else:
            self.start(name, "join", self._invite_of(name), *place, "--config", config)

    def command(self, name: str, arguments: list[str]) -> list[str]:
        return self.spots[name].place.command(arguments)

    def environment(self, name: str) -> dict[str, str]:
        own = self.spots[name].clock
        return own.environment if own else {}

    def end(self) -> None:
        """Kill and reap whoever is still there."""
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait()

    # ------------------------------------------------------------------------------ what can befall

    def freeze(self, name: str) -> None:
        os.kill(self.processes[name].pid, signal.SIGSTOP)
        self.frozen.add(name)

    def thaw(self, name: str) -> None:
        self.frozen.discard(name)
        if name in self.processes:
            os.kill(self.processes[name].pid, signal.SIGCONT)

    def cut(self, name: str) -> None:
        """Nothing reaches ``name`` any more, and nothing that it sends arrives."""
        self._set_port(name, "down")

    def fill(self, name: str) -> None:
        """No space is left on the disk of ``name``."""
        if disk := self.spots[name].disk:
            disk.fill()

    def free(self, name: str) -> None:
        if disk := self.spots[name].disk:
            disk.free()

    def set_clock(self, name: str, seconds: float) -> None:
        """The clock of ``name`` is ``seconds`` ahead from now on."""
        if own := self.spots[name].clock:
            own.set(seconds)

    def heal(self, name: str) -> None:
        self._set_port(name, "up")

    def part(self, names: Sequence[str]) -> None:
        """From now on ``names`` reach only each other, and the others too."""
        for name in names:
            self._set_port(name, "master", HALF)

    def unite(self) -> None:
        for name in self.spots:
            self._set_port(name, "master", "hub")

    def _set_port(self, name: str, *state: str) -> None:
        place = self.spots[name].place
        _ip("-n", place.hub, "link", "set", place.port, *state)

    # -------------------------------------------------------------------------------------- helpers

    def _config_of(self, name: str) -> Path:
        """The run's configuration with this process's own address in it."""
        tree = yaml.safe_load(self.config.read_text())
        tree["node"]["listen"] = [f"/ip4/{self.spots[name].place.address}/tcp/0"]
        if name in self._strangers:
            tree["node"]["cache"] = str(self.directory / name / "cache")
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def _invite_of(self, name: str) -> str:
        """The operator's invite; a newcomer is brought in by a member that runs."""
        if name in self._strangers and not (self.directory / name / "peers.json").exists():
            for member in sorted(self.processes):
                with contextlib.suppress(PsycheError):
                    return invite_from(self.directory / member).encode()
        return f"@{self.directory / COORDINATOR / 'invite'}"


def why_not() -> str | None:
    """Why this machine cannot have such a world, or None."""
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
def world(
    directory: Path,
    names: Sequence[str],
    *,
    standbys: Sequence[str] = (),
    strangers: Sequence[str] = (),
    plain: bool = False,
) -> Iterator[World]:
    """A world for processes of these ``names``. All of it is gone when the block is left; their logs are not.

    ``plain``: network, disk and clock are the machine's, and are not to be touched.
    """
    directory.mkdir(parents=True)
    with contextlib.ExitStack() as undo:
        spots = _plain(names) if plain else _made(directory, names, undo)
        running = World(directory, spots, standbys, strangers)
        undo.callback(running.end)
        yield running


def _plain(names: Sequence[str]) -> dict[str, Spot]:
    return {name: Spot(place, None, None) for name, place in zip(names, on_loopback(len(names)), strict=True)}


def _made(directory: Path, names: Sequence[str], undo: contextlib.ExitStack) -> dict[str, Spot]:
    library = clock.build(directory)
    places = undo.enter_context(shaped([Link()] * len(names)))
    _ip("-n", places[0].hub, "link", "add", HALF, "type", "bridge")
    _ip("-n", places[0].hub, "link", "set", HALF, "up")
    spots = {}
    for name, place in zip(names, places, strict=True):
        disk = Disk(directory / name, DISK_BYTES)
        undo.callback(disk.close)
        spots[name] = Spot(place, disk, Clock(directory / f"{name}.clock", library))
    return spots


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
