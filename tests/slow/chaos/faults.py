"""What is to happen to a run, and when: drawn from a seed alone, so that the same seed is the same story again.

Only what a fault meets differs from one time to the next. A process suffers one thing at a time, so that a recovery can
be laid at one fault's door; the network may be in two halves meanwhile.
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
"""Those that need nothing of the machine."""
OF_COORDINATORS = frozenset({"kill", "restart", "freeze", "cut", "disk full", "clock"})

GAP = (3.0, 9.0)
"""Seconds from one fault to the next."""
LENGTH = (5.0, 25.0)
"""Seconds until one is undone."""
SETTLE = 10.0
"""Seconds afterwards before the same process suffers the next."""
OFF = (60.0, 600.0)
"""Seconds that a clock is wrong, forward or back."""
UNDISTURBED = 2
"""Nodes that nothing happens to, at any time; of coordinators one."""


@dataclass(frozen=True)
class Fault:
    """``length`` is inf for what is not undone; ``others`` are the second half of a partition."""

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
    """Faults within the first ``seconds``. ``spare`` are the names of nodes that may join.

    Kinds come in shuffled sets of all, so that a short story has each of them, too. Of the nodes only as many leave
    for good as have joined before.
    """
    return _Draw(seed, nodes, coordinators, spare, kinds).until(seconds)


class _Draw:
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
        """Until when something happens to a process."""
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
            for kind in list(bag):  # those that cannot be now come later
                if (fault := self._of(kind, now)) is not None:
                    found.append(fault)
                    bag.remove(kind)
                    break
            now += self._random.uniform(*GAP)
        return found

    def _of(self, kind: Kind, now: float) -> Fault | None:
        """A fault of that kind; None where it cannot be now: all that it could happen to have other worries."""
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
        self._busy[name] = now + LENGTH[1] + SETTLE  # it has to get there first
        return Fault(now, "join", name)
