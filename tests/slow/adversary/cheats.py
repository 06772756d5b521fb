"""Nodes that lie, each in one way: what they hand in instead of a round's work, or say of others'.

A cheat is a replica whose training is tampered with; everything it commits to follows from what it did, as far as it
can without doing the work. So each is caught by what it cannot make up, not by a mistake of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from psyche.protocol.messages import Plan
from psyche.roles.replica import Replica
from psyche.roles.work import Work
from psyche.training.engine import Batch


@dataclass
class Swarm:
    """What hostile nodes of one run know of each other and of the honest ones."""

    replicas: dict[str, Replica] = field(default_factory=dict)
    hostile: frozenset[str] = frozenset()
    from_round: int = 1
    """Before it they are honest."""

    def moved(self, node: str) -> Tensor:
        """x − θ of what a node has trained last, ``[n]`` fp32: what a friend, or a spy, tells."""
        replica = self.replicas[node]
        return replica._snapshot - self._theta_of[node]

    _theta_of: dict[str, Tensor] = field(default_factory=dict)


Forge = Callable[["Cheat", Plan, Tensor], Tensor]
"""x − θ that is handed in, given what honest work has moved; both ``[n]`` fp32."""


class Cheat(Replica):
    """A replica that hands in ``forge`` of what it has trained, after ``lazy`` of the steps if that is not all."""

    swarm: Swarm
    forge: Forge | None = None
    lazy: float = 1.0
    """Share of the inner steps that it takes."""
    data: Callable[[Batch], Batch] | None = None
    """What it trains on instead of the sequences it was dealt."""

    def train(self, plan: Plan, **hooks: object) -> Work:  # type: ignore[override]
        """The round's work."""
        if plan.round < self.swarm.from_round:
            return super().train(plan, **hooks)  # type: ignore[arg-type]
        member = plan.member(self.node)
        assert member is not None
        due, honest_step = member.inner_steps, self.engine.step
        taken = 0

        def step(batch: Batch, lr: float) -> float:
            nonlocal taken
            taken += 1
            loss = 1.0
            if taken <= max(1, round(self.lazy * due)):
                loss = honest_step(batch if self.data is None else self.data(batch), lr)
            if taken == due:
                self._forge(plan, due)
            return loss

        self.engine.step = step  # type: ignore[method-assign]
        try:
            return super().train(plan, **hooks)  # type: ignore[arg-type]
        finally:
            self.engine.step = honest_step  # type: ignore[method-assign]

    def _forge(self, plan: Plan, due: int) -> None:
        flat = torch.empty(self.engine.layout.size)
        self.engine.read(flat)
        moved = flat - self.outer.theta
        if self.lazy < 1:
            moved *= due / max(1, round(self.lazy * due))
        if self.forge is not None:
            moved = self.forge(self, plan, moved)
        self.engine.write(self.outer.theta + moved)


def zero(cheat: Cheat, plan: Plan, moved: Tensor) -> Tensor:
    """Nothing at all."""
    return torch.zeros_like(moved)


def noise(cheat: Cheat, plan: Plan, moved: Tensor) -> Tensor:
    """Random numbers of the norm that honest work has."""
    found = torch.randn(moved.shape, generator=torch.Generator().manual_seed(plan.round))
    return found * (moved.norm() / found.norm())


def scaled(factor: float) -> Forge:
    """Honest work, scaled: −1 is a sign flip."""
    return lambda cheat, plan, moved: factor * moved


class Memory:
    """Hands in what it handed in first, for ever."""

    def __init__(self) -> None:
        self._first: dict[str, Tensor] = {}

    def __call__(self, cheat: Cheat, plan: Plan, moved: Tensor) -> Tensor:
        return self._first.setdefault(cheat.node, moved)


class Observer:
    """Sees what honest nodes have trained in this round; the simulator trains them first."""

    def __init__(self, make: Callable[[Sequence[Tensor]], Tensor]) -> None:
        self._make = make
        self.seen: dict[str, Tensor] = {}

    def __call__(self, cheat: Cheat, plan: Plan, moved: Tensor) -> Tensor:
        return self._make([self.seen[node] for node in sorted(self.seen)]) if self.seen else moved


def copied(seen: Sequence[Tensor]) -> Tensor:
    """A peer's work."""
    return seen[0].clone()


def inner_product(seen: Sequence[Tensor]) -> Tensor:
    """Inner-product manipulation (Xie et al., arXiv 1903.03936): against the mean of the honest, at its length."""
    return -torch.stack(list(seen)).mean(0)


def a_little(seen: Sequence[Tensor]) -> Tensor:
    """A little is enough (Baruch et al., arXiv 1902.06156): a standard deviation off the mean, everywhere."""
    stack = torch.stack(list(seen))
    return stack.mean(0) - stack.std(0, unbiased=False)


def other_data(batch: Batch) -> Batch:
    """Sequences it was not dealt: those it was, read backwards."""
    return batch[:, ::-1].copy()
