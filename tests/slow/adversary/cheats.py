"""Nodes that lie, each in one way: what they hand in instead of a round's work, or say of others'.

A cheat is a replica whose training is tampered with; everything it commits to follows from what it did, as far as it
can without doing the work. So each is caught by what it cannot make up, not by a mistake of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from psyche.diloco.replica import LocalUpdate, Replica
from psyche.protocol.messages import Plan
from psyche.training.engine import Batch


class Swarm:
    """What hostile nodes of one run know of each other and of the honest ones."""

    def __init__(self, from_round: int = 1) -> None:
        """Before ``from_round`` they are honest."""
        self.from_round = from_round
        self.moved: dict[str, Tensor] = {}
        """x − θ (``[n]`` fp32) of what each honest node has trained last. The simulator trains them first."""

    @property
    def honest(self) -> Tensor:
        """The same of all, ``[nodes, n]``."""
        return torch.stack([self.moved[node] for node in sorted(self.moved)])


class Honest(Replica):
    """A replica that hostile nodes spy on."""

    swarm: Swarm

    def train(self, plan: Plan, **hooks: object) -> LocalUpdate:  # type: ignore[override]
        """The round's work."""
        work = super().train(plan, **hooks)  # type: ignore[arg-type]
        self.swarm.moved[self.node] = moved_by(self)
        return work


def moved_by(replica: Replica) -> Tensor:
    """x − θ of what it has trained, ``[n]`` fp32."""
    flat = torch.empty(replica.engine.layout.size)
    replica.engine.read(flat)
    return flat.sub_(replica.outer.theta)


Forge = Callable[["Cheat", Plan, Tensor], Tensor]
"""x − θ that is handed in, given what honest work has moved; both ``[n]`` fp32."""


class Cheat(Replica):
    """A replica that hands in ``forge`` of what it has trained, after ``lazy`` of the steps if that is not all."""

    swarm: Swarm
    forge: Forge | None = None
    lazy: float = 1.0
    """Share of the inner steps that it takes."""
    before: Tensor | None = None
    """What it trained last."""
    data: Callable[[Batch], Batch] | None = None
    """What it trains on instead of the sequences it was dealt."""

    def train(self, plan: Plan, **hooks: object) -> LocalUpdate:  # type: ignore[override]
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
        moved = moved_by(self)
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


def own_old() -> Forge:
    """What it handed in first, for ever."""
    first: dict[str, Tensor] = {}
    return lambda cheat, plan, moved: first.setdefault(cheat.node, moved)


def stale(cheat: Cheat, plan: Plan, moved: Tensor) -> Tensor:
    """What it trained for the round before, from an older state."""
    before, cheat.before = cheat.before, moved
    return moved if before is None else before


def copied(cheat: Cheat, plan: Plan, moved: Tensor) -> Tensor:
    """A peer's work."""
    return cheat.swarm.honest[0].clone()


def inner_product(cheat: Cheat, plan: Plan, moved: Tensor) -> Tensor:
    """Inner-product manipulation (Xie et al., arXiv 1903.03936): against the mean of the honest, at its length."""
    return -cheat.swarm.honest.mean(0)


def a_little(cheat: Cheat, plan: Plan, moved: Tensor) -> Tensor:
    """A little is enough (Baruch et al., arXiv 1902.06156): a standard deviation off the mean, everywhere."""
    return cheat.swarm.honest.mean(0) - cheat.swarm.honest.std(0, unbiased=False)


def other_data(batch: Batch) -> Batch:
    """Sequences it was not dealt: those it was, read backwards."""
    return batch[:, ::-1].copy()


def hands_nothing_over(cheat: Cheat) -> None:
    """Honest work that nobody can check."""
    cheat.trace_recorder.bundles = None


def armed(**how: object) -> Callable[[Cheat], None]:
    """Sets fields of a :class:`Cheat`."""

    def arm(cheat: Cheat) -> None:
        for name, value in how.items():
            setattr(cheat, name, value)

    return arm


WAYS: dict[str, Callable[[Cheat], None]] = {
    "zero update": armed(forge=zero),
    "noise of the right norm": armed(forge=noise),
    "sign flip": armed(forge=scaled(-1)),
    "×10": armed(forge=scaled(10)),
    "×1.5": armed(forge=scaled(1.5)),
    "stale base": armed(forge=stale),
    "27 of 30 steps": armed(lazy=0.9),
    "half of the steps": armed(lazy=0.5),
    "other data": armed(data=other_data),
    "copy of a peer": armed(forge=copied),
    "own old payload": lambda cheat: armed(forge=own_old())(cheat),
    "inner-product manipulation": armed(forge=inner_product),
    "a little is enough": armed(forge=a_little),
}
"""Ways to lie about one's own work."""
