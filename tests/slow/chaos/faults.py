"""A random schedule of faults, determined by a seed alone.

A process suffers one fault at a time, so that a recovery can be attributed to it; a partition may overlap.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

Kind = Literal["kill", "restart", "freeze", "cut", "partition", "disk full", "clock", "leave", "join"]
KINDS: tuple[Kind, ...] = ("kill", "restart", "freeze", "cut", "partition", "disk full", "clock", "leave", "join")
PLAIN: tuple[Kind, ...] = ("kill", "restart", "freeze", "leave", "join")
"""Kinds that need no support from the machine."""
OF_COORDINATORS = frozenset({"kill", "restart", "freeze", "cut", "disk full", "clock"})

GAP = (3.0, 9.0)
"""Seconds between faults."""
LENGTH = (5.0, 25.0)
"""Seconds until a fault is undone."""
SETTLE = 10.0
"""Seconds after a fault before the same process may suffer the next."""
OFF = (60.0, 600.0)
"""Clock error in seconds, in either direction."""
UNDISTURBED = 2
"""Nodes that are left undisturbed at any time; one coordinator is, too."""


@dataclass(frozen=True)
class Fault:
    """``length`` is inf for a fault that is never undone; ``others`` complete the half of ``target`` in a partition."""

    at: float
    kind: Kind
    target: str
    length: float = 0.0
    offset: float = 0.0
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        extent = f" for {self.length:.0f} s" if 0 < self.length < inf else ""
        offset = f" by {self.offset:+.0f} s" if self.offset else ""
        return f"{self.at:6.1f} s  {self.kind} {self.target}{' '.join(('', *self.others))}{offset}{extent}"


def schedule(
    seed: int,
    seconds: float,
    nodes: Sequence[str],
    coordinators: Sequence[str],
    spare: Sequence[str],
    kinds: Sequence[Kind] = KINDS,
) -> list[Fault]:
    """Return the faults of the first ``seconds``. ``spare`` names the nodes that may join.

    Kinds come in shuffled sets of all, so that a short schedule has each of them. No more nodes leave for good than
    have joined before.
    """
    return _Scheduler(seed, nodes, coordinators, spare, kinds).until(seconds)


class _Scheduler:
    def __init__(
        self,
        seed: int,
        nodes: Sequence[str],
        coordinators: Sequence[str],
        spare: Sequence[str],
        kinds: Sequence[Kind],
    ) -> None:
        self._random, self._kinds = random.Random(seed), kinds
        self._nodes, self._coordinators, self._spare = list(nodes), list(coordinators), list(spare)
        self._busy: dict[str, float] = {}
        """Time until which each process has a fault."""
        self._united = 0.0
        self._left = 0
        self._joined = 0

    def until(self, seconds: float) -> list[Fault]:
        found: list[Fault] = []
        bag: list[Kind] = []
        now = self._random.uniform(*GAP)
        while now < seconds:
            if not bag:
                bag = [kind for kind in self._kinds if kind != "join" or self._spare]
                self._random.shuffle(bag)
            for kind in list(bag):  # a kind that is not possible now is tried later
                if (fault := self._of(kind, now)) is not None:
                    found.append(fault)
                    bag.remove(kind)
                    break
            now += self._random.uniform(*GAP)
        return found

    def _of(self, kind: Kind, now: float) -> Fault | None:
        """Return a fault of that kind, or None if every possible target is busy."""
        length = self._random.uniform(*LENGTH)
        if kind == "partition":
            return self._partition(now, length)
        if kind == "join":
            return self._join(now)
        target = self._target(kind, now)
        if target is None:
            return None
        fault = Fault(now, kind, target, 0.0 if kind == "restart" else length)
        if kind == "clock":
            fault = replace(fault, offset=self._random.choice((-1, 1)) * self._random.uniform(*OFF))
        if kind == "leave" and self._joined > self._left and self._random.random() < 0.5:
            self._left += 1
            self._nodes.remove(target)
            return replace(fault, length=inf)
        self._busy[target] = now + fault.length + SETTLE
        return fault

    def _target(self, kind: Kind, now: float) -> str | None:
        of_coordinators = self._random.random() < 0.25 and kind in OF_COORDINATORS
        group, least = (self._coordinators, 1) if of_coordinators else (self._nodes, UNDISTURBED)
        free = [name for name in group if self._busy.get(name, 0.0) <= now]
        return self._random.choice(free) if len(free) > least else None

    def _partition(self, now: float, length: float) -> Fault | None:
        everybody = [*self._nodes, *self._coordinators]
        half = self._random.sample(everybody, len(everybody) // 2)
        if now < self._united:
            return None
        self._united = now + length + SETTLE
        return Fault(now, "partition", half[0], length, others=tuple(half[1:]))

    def _join(self, now: float) -> Fault | None:
        if not self._spare:
            return None
        name = self._spare.pop(0)
        self._nodes.append(name)
        self._joined += 1
        self._busy[name] = now + LENGTH[1] + SETTLE  # it needs time to join
        return Fault(now, "join", name)
