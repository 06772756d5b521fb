"""Plays a schedule of faults on a world, and is the service manager that starts again what has ended by itself."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from tests.processes.swarm import PATIENCE
from tests.slow.chaos.faults import Fault
from tests.slow.chaos.watch import Seen
from tests.slow.chaos.world import World

AGAIN_SECONDS = 5.0
"""After which what has ended by itself is started again."""
LINGER_SECONDS = 20.0
"""How long after it was undone a fault may still be why a process ends."""
STOPPED = 130
REASONS = {
    "disk full": re.compile(r"no space|disk .*full|disk is full|database or disk|disk: .* free at", re.IGNORECASE),
    "network": re.compile(r"bootstrap nodes could be joined|could not get"),
}
"""What a process may say when it ends by itself, by what has to be going on."""


@dataclass
class Done:
    """A fault that met a process it could happen to, by ``time.monotonic``."""

    fault: Fault
    began: float
    undone: float = inf


@dataclass
class Ended:
    """A process that ended by itself."""

    name: str
    code: int
    said: str
    during: tuple[str, ...]
    """Kinds of faults that it suffered then, or a little before."""


@dataclass
class Conductor:
    """``done`` and ``ended`` are what happened."""

    world: World
    seen: Seen
    done: list[Done] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Nodes that are gone for good."""
    present: list[str] = field(default_factory=list)
    """Everybody else who was begun."""
    leaving_seconds: list[float] = field(default_factory=list)
    """From Ctrl-C to the exit of each that left in the course of the story."""
    _leaving: dict[str, float] = field(default_factory=dict)
    """When each that leaves now was told to."""
    _away: set[str] = field(default_factory=set)
    """Who must not be started now."""
    _down: dict[str, float] = field(default_factory=dict)
    """When who has ended by itself did."""

    def begin(self, *names: str) -> None:
        """Start processes, for the first time or again."""
        for name in names:
            self._down.pop(name, None)
            self.world.begin(name)
            if name not in self.present:
                self.present.append(name)

    def play(self, schedule: Sequence[Fault], seconds: float) -> None:
        """All of ``schedule``, and what undoes it; then everybody who has not left for good is there again."""
        began = time.monotonic()
        steps: list[tuple[float, Fault, bool]] = [(fault.at, fault, False) for fault in schedule]
        steps += [(min(fault.at + fault.length, seconds), fault, True) for fault in schedule if fault.length < inf]
        open: dict[int, Done] = {}
        for at, fault, undo in sorted(steps, key=lambda step: (step[0], step[2])):
            self._wait_until(began + at)
            if not undo and self._happen(fault):
                open[id(fault)] = Done(fault, time.monotonic())
                self.done.append(open[id(fault)])
            elif undo and id(fault) in open:
                self._undo(fault)
                open[id(fault)].undone = time.monotonic()
        self._wait_until(began + seconds)

    def tend(self) -> None:
        """Reap who has ended, and start again who should be there."""
        for name, process in list(self.world.processes.items()):
            if (code := process.poll()) is None:
                continue
            del self.world.processes[name]
            told = self._leaving.pop(name, None)
            if told is not None and code in (STOPPED, -signal.SIGINT):  # the latter where it had only begun to start
                self.leaving_seconds.append(time.monotonic() - told)
            else:
                last = self.world.output(name).strip().splitlines()[-1:]
                self.ended.append(Ended(name, code, "".join(last), self._going_on(name)))
                self._down[name] = time.monotonic()
        for name, since in list(self._down.items()):
            if time.monotonic() - since > AGAIN_SECONDS and name not in self._away:
                self.begin(name)

    def wait_for_all(self, nodes: dict[str, str], seconds: float) -> int:
        """The first round from now on that every one of ``nodes`` (name -> PeerID) contributed to."""
        reached, until = self.seen.newest, time.monotonic() + seconds
        while time.monotonic() < until:
            for round_number, accepted in sorted(self.seen.accepted.items()):
                if round_number > reached and accepted >= set(nodes.values()):
                    return round_number
            self.tend()
            time.sleep(0.2)
        raise AssertionError("\n\n".join(f"{name}: {self.world.output(name)[-1500:]}" for name in self.world.spots))

    def stop_all(self) -> None:
        """Ctrl-C for everybody at once; all leave cleanly."""
        for process in self.world.processes.values():
            process.send_signal(signal.SIGINT)
        for name in sorted(self.world.processes):
            code = self.world.join(name)
            assert code == STOPPED, (name, code, self.world.output(name)[-3000:])

    def unexplained(self) -> list[Ended]:
        """Who ended by itself for another reason than one that was given it."""
        return [one for one in self.ended if not _explained(one)]

    # ------------------------------------------------------------------------------------ one fault

    def _happen(self, fault: Fault) -> bool:
        """Whether it could happen: who has ended by itself meanwhile cannot be killed."""
        world, name = self.world, fault.target
        match fault.kind:
            case "join":
                self.begin(name)
                return True
            case "partition":
                world.part([name, *fault.others])
                return True
            case "cut":
                world.cut(name)
                return True
            case "clock":
                world.set_clock(name, fault.offset)
                return True
            case "disk full":
                world.fill(name)
                return True
        if name not in world.processes:
            if fault.length == inf:
                self._gone_for_good(name)
            return False
        match fault.kind:
            case "freeze":
                world.freeze(name)
            case "kill" | "restart":
                self._away.add(name)
                world.kill(name)
            case "leave":
                self._away.add(name)
                self._leaving[name] = time.monotonic()
                world.processes[name].send_signal(signal.SIGINT)
                if fault.length == inf:
                    self._gone_for_good(name)
        return True

    def _undo(self, fault: Fault) -> None:
        world, name = self.world, fault.target
        match fault.kind:
            case "partition":
                world.unite()
            case "cut":
                world.heal(name)
            case "clock":
                world.set_clock(name, 0.0)
            case "disk full":
                world.free(name)
            case "freeze":
                world.thaw(name)
            case "kill" | "restart" | "leave":
                until = time.monotonic() + PATIENCE
                while name in world.processes:  # it takes its time to leave
                    assert time.monotonic() < until, f"{name} did not leave: {world.output(name)[-3000:]}"
                    self.tend()
                    time.sleep(0.1)
                self._away.discard(name)
                self.begin(name)

    def _gone_for_good(self, name: str) -> None:
        self.left.append(name)
        self.present.remove(name)
        self._away.add(name)
        self._down.pop(name, None)

    def _going_on(self, name: str) -> tuple[str, ...]:
        now = time.monotonic()
        there = [done.fault for done in self.done if now < done.undone + LINGER_SECONDS]
        return tuple(fault.kind for fault in there if fault.target == name or fault.kind == "partition")

    def _wait_until(self, moment: float) -> None:
        while (left := moment - time.monotonic()) > 0:
            self.tend()
            time.sleep(min(left, 0.2))


def _explained(one: Ended) -> bool:
    if "disk full" in one.during and REASONS["disk full"].search(one.said):
        return True
    return bool(REASONS["network"].search(one.said))
