"""Malicious nodes: each forges its contribution, or trains, in one way.

A cheating node is a replica with tampered training; everything it commits to follows from what it did, as far as that
is possible without doing the work. So it is caught by what it cannot fabricate, not by an inconsistency.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from psyche.diloco.replica import LocalUpdate, Replica
from psyche.protocol.messages import Plan
from psyche.training.engine import Batch


class Swarm:
    """What the malicious nodes of one run know of each other and of the honest nodes."""

    def __init__(self, from_round: int = 1) -> None:
        """Be honest before ``from_round``."""
        self.from_round = from_round
        self.moved: dict[str, Tensor] = {}
        """x − θ (``[n]`` fp32) of each honest node's latest round. The simulator trains honest nodes first."""

    @property
    def honest(self) -> Tensor:
        """The updates of all honest nodes, ``[nodes, n]``."""
        return torch.stack([self.moved[node] for node in sorted(self.moved)])


class Honest(Replica):
    """A replica whose updates malicious nodes can see."""

    swarm: Swarm

    def train(self, plan: Plan, **hooks: object) -> LocalUpdate:  # type: ignore[override]
        """Train the round and publish the update to the swarm."""
        work = super().train(plan, **hooks)  # type: ignore[arg-type]
        self.swarm.moved[self.node] = moved_by(self)
        return work


def moved_by(replica: Replica) -> Tensor:
    """Return x − θ of the replica's last training, ``[n]`` fp32."""
    flat = torch.empty(replica.engine.layout.size)
    replica.engine.read(flat)
    return flat.sub_(replica.outer.theta)


Forge = Callable[["Cheat", Plan, Tensor], Tensor]
"""Given x − θ of honest work, returns the x − θ to submit instead; both ``[n]`` fp32."""


class Cheat(Replica):
    """A replica that submits ``forge`` of its update, and may skip steps or train on other data."""

    swarm: Swarm
    forge: Forge | None = None
    lazy: float = 1.0
    """Share of the inner steps that it takes."""
    before: Tensor | None = None
    """Its update of the previous round."""
    data: Callable[[Batch], Batch] | None = None
    """Maps its assigned batch to the one it trains on."""

    def train(self, plan: Plan, **hooks: object) -> LocalUpdate:  # type: ignore[override]
        """Train the round, dishonestly from ``swarm.from_round``."""
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
    """Submit no change."""
    return torch.zeros_like(moved)


def noise(cheat: Cheat, plan: Plan, moved: Tensor) -> Tensor:
    """Submit random numbers with the norm of the honest update."""
    found = torch.randn(moved.shape, generator=torch.Generator().manual_seed(plan.round))
    return found * (moved.norm() / found.norm())


def scaled(factor: float) -> Forge:
    """Scale the honest update; −1 is a sign flip."""
    return lambda cheat, plan, moved: factor * moved


def replayed_own() -> Forge:
    """Submit the first update in every round."""
    first: dict[str, Tensor] = {}
    return lambda cheat, plan, moved: first.setdefault(cheat.node, moved)


def stale(cheat: Cheat, plan: Plan, moved: Tensor) -> Tensor:
    """Submit the update of the previous round, trained from an older state."""
    before, cheat.before = cheat.before, moved
    return moved if before is None else before


def copied(cheat: Cheat, plan: Plan, moved: Tensor) -> Tensor:
    """Submit a peer's update."""
    return cheat.swarm.honest[0].clone()


def inner_product(cheat: Cheat, plan: Plan, moved: Tensor) -> Tensor:
    """Inner-product manipulation (Xie et al., arXiv 1903.03936): the negated mean of the honest updates."""
    return -cheat.swarm.honest.mean(0)


def a_little(cheat: Cheat, plan: Plan, moved: Tensor) -> Tensor:
    """A little is enough (Baruch et al., arXiv 1902.06156): one standard deviation from the honest mean."""
    return cheat.swarm.honest.mean(0) - cheat.swarm.honest.std(0, unbiased=False)


def other_data(batch: Batch) -> Batch:
    """Return the assigned sequences reversed."""
    return batch[:, ::-1].copy()


def withhold_bundles(cheat: Cheat) -> None:
    """Train honestly but serve no audit bundles."""
    cheat.trace_recorder.bundles = None


def with_attack(**fields: object) -> Callable[[Cheat], None]:
    """Return a function that sets fields of a :class:`Cheat`."""

    def apply(cheat: Cheat) -> None:
        for name, value in fields.items():
            setattr(cheat, name, value)

    return apply


ATTACKS: dict[str, Callable[[Cheat], None]] = {
    "zero update": with_attack(forge=zero),
    "noise of the right norm": with_attack(forge=noise),
    "sign flip": with_attack(forge=scaled(-1)),
    "×10": with_attack(forge=scaled(10)),
    "×1.5": with_attack(forge=scaled(1.5)),
    "stale base": with_attack(forge=stale),
    "27 of 30 steps": with_attack(lazy=0.9),
    "half of the steps": with_attack(lazy=0.5),
    "other data": with_attack(data=other_data),
    "copy of a peer": with_attack(forge=copied),
    "own old payload": lambda cheat: with_attack(forge=replayed_own())(cheat),
    "inner-product manipulation": with_attack(forge=inner_product),
    "a little is enough": with_attack(forge=a_little),
}
"""Ways to cheat in one's own work, by name."""
