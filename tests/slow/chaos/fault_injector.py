"""Applies a schedule of faults to a testbed, and restarts processes that exit on their own."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from tests.processes.swarm import PATIENCE
from tests.slow.chaos.faults import Fault
from tests.slow.chaos.observer import Observations
from tests.slow.chaos.testbed import Testbed

RESTART_SECONDS = 5.0
"""Delay before a process that exited on its own is restarted."""
LINGER_SECONDS = 20.0
"""How long after its end a fault may still explain an exit."""
STOPPED = 130
REASONS = {
    "disk full": re.compile(r"no space|disk .*full|disk is full|database or disk|disk: .* free at", re.IGNORECASE),
    "network": re.compile(r"bootstrap nodes could be joined|could not get"),
}
"""Last lines of output that explain an exit, by cause."""


@dataclass
class AppliedFault:
    """A fault that was applied; times are of ``time.monotonic``."""

    fault: Fault
    began: float
    undone: float = inf


@dataclass
class UnpromptedExit:
    """A process that exited on its own."""

    name: str
    code: int
    last_line: str
    during: tuple[str, ...]
    """Kinds of faults that were active then or shortly before."""


@dataclass
class FaultInjector:
    """``done`` and ``ended`` record what happened."""

    world: Testbed
    seen: Observations
    done: list[AppliedFault] = field(default_factory=list)
    ended: list[UnpromptedExit] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Nodes that left for good."""
    present: list[str] = field(default_factory=list)
    """All other nodes that were started."""
    leaving_seconds: list[float] = field(default_factory=list)
    """Seconds from Ctrl-C to exit of each node that left during the schedule."""
    _leaving: dict[str, float] = field(default_factory=dict)
    """When each node that is leaving was told to."""
    _away: set[str] = field(default_factory=set)
    """Processes that must not be restarted now."""
    _down: dict[str, float] = field(default_factory=dict)
    """When each process that exited on its own did so."""

    def begin(self, *names: str) -> None:
        """Start processes, for the first time or again."""
        for name in names:
            self._down.pop(name, None)
            self.world.begin(name)
            if name not in self.present:
                self.present.append(name)

    def run_schedule(self, schedule: Sequence[Fault], seconds: float) -> None:
        """Apply ``schedule`` and undo each fault.

        At the end every node that did not leave for good is running.
        """
        began = time.monotonic()
        steps: list[tuple[float, Fault, bool]] = [(fault.at, fault, False) for fault in schedule]
        steps += [(min(fault.at + fault.length, seconds), fault, True) for fault in schedule if fault.length < inf]
        active: dict[int, AppliedFault] = {}
        for at, fault, undo in sorted(steps, key=lambda step: (step[0], step[2])):
            self._wait_until(began + at)
            if not undo and self._apply(fault):
                active[id(fault)] = AppliedFault(fault, time.monotonic())
                self.done.append(active[id(fault)])
            elif undo and id(fault) in active:
                self._undo(fault)
                active[id(fault)].undone = time.monotonic()
        self._wait_until(began + seconds)

    def supervise(self) -> None:
        """Reap processes that exited, and restart those that should be running."""
        for name, process in list(self.world.processes.items()):
            if (code := process.poll()) is None:
                continue
            del self.world.processes[name]
            told = self._leaving.pop(name, None)
            if told is not None and code in (STOPPED, -signal.SIGINT):  # the latter if it was still starting
                self.leaving_seconds.append(time.monotonic() - told)
            else:
                last = self.world.output(name).strip().splitlines()[-1:]
                self.ended.append(UnpromptedExit(name, code, "".join(last), self._active_faults(name)))
                self._down[name] = time.monotonic()
        for name, since in list(self._down.items()):
            if time.monotonic() - since > RESTART_SECONDS and name not in self._away:
                self.begin(name)

    def wait_for_all(self, nodes: dict[str, str], seconds: float) -> int:
        """Return the next round that every one of ``nodes`` (name -> PeerID) contributes to."""
        reached, until = self.seen.newest, time.monotonic() + seconds
        while time.monotonic() < until:
            for round_number, accepted in sorted(self.seen.accepted.items()):
                if round_number > reached and accepted >= set(nodes.values()):
                    return round_number
            self.supervise()
            time.sleep(0.2)
        raise AssertionError("\n\n".join(f"{name}: {self.world.output(name)[-1500:]}" for name in self.world.hosts))

    def stop_all(self) -> None:
        """Send Ctrl-C to all processes at once, and check that all leave gracefully."""
        for process in self.world.processes.values():
            process.send_signal(signal.SIGINT)
        for name in sorted(self.world.processes):
            code = self.world.join(name)
            assert code == STOPPED, (name, code, self.world.output(name)[-3000:])

    def unexplained(self) -> list[UnpromptedExit]:
        """Return the exits that no injected fault explains."""
        return [one for one in self.ended if not _explained(one)]

    # ------------------------------------------------------------------------------------ one fault

    def _apply(self, fault: Fault) -> bool:
        """Apply the fault. Return False if it could not be: a process that has exited cannot be killed."""
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
                while name in world.processes:  # leaving takes a while
                    assert time.monotonic() < until, f"{name} did not leave: {world.output(name)[-3000:]}"
                    self.supervise()
                    time.sleep(0.1)
                self._away.discard(name)
                self.begin(name)

    def _gone_for_good(self, name: str) -> None:
        self.left.append(name)
        self.present.remove(name)
        self._away.add(name)
        self._down.pop(name, None)

    def _active_faults(self, name: str) -> tuple[str, ...]:
        now = time.monotonic()
        recent = [done.fault for done in self.done if now < done.undone + LINGER_SECONDS]
        return tuple(fault.kind for fault in recent if fault.target == name or fault.kind == "partition")

    def _wait_until(self, moment: float) -> None:
        while (left := moment - time.monotonic()) > 0:
            self.supervise()
            time.sleep(min(left, 0.2))


def _explained(one: UnpromptedExit) -> bool:
    if "disk full" in one.during and REASONS["disk full"].search(one.last_line):
        return True
    return bool(REASONS["network"].search(one.last_line))
