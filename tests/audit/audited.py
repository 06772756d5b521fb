"""A node whose round is audited, another that audits it, and what each kind of cheat does instead of the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from msgspec.structs import replace
from torch import Tensor

from psyche.audit.audit_case import AuditCase, audit
from psyche.config import Manifest, Node, load_config
from psyche.diloco.audit_bundle import AuditBundle, AuditBundleStore
from psyche.diloco.launch import launch
from psyche.diloco.replica import LocalUpdate, Replica
from psyche.network.identity import Identity
from psyche.protocol.audit_messages import EMPTY, Audit, Finding
from psyche.protocol.messages import Accepted, Member, Plan, Record
from psyche.protocol.proposals import round_seed
from tests.tiny import replica, write_config

STEPS = 30
"""H, as where the relative errors of REFERENCES were measured."""
ROUNDS = {"total": 6, "inner_steps": STEPS, "start_members": 2}

SEED = b"seed"
"""What draws what auditors look at."""

Tamper = Callable[[Replica, int], None]
"""Called after every inner step, with its number."""


@dataclass
class Court:
    """One run: who is audited, who audits, and somebody to copy from."""

    manifest: Manifest
    settings: Node
    directory: Path
    accused: Replica
    auditor: Replica
    peer: Replica

    @property
    def nodes(self) -> list[str]:
        return sorted(one.node for one in (self.accused, self.auditor, self.peer))

    def plan(self) -> Plan:
        """The next round, of all three."""
        chain = self.auditor.chain
        members = tuple(Member(node, self.auditor.run.rounds.inner_steps, 1) for node in self.nodes)
        seed = round_seed(chain.head)
        return Plan(chain.rounds + 1, 1, chain.head, chain.state_root, seed, chain.position, "gather", 0, members)

    def advance(self, plan: Plan, works: dict[str, LocalUpdate], audits: tuple[Audit, ...] = ()) -> Record:
        """The round is certified with these contributions, and these audits are open."""
        accepted = tuple(Accepted(node, works[node].contribution) for node in sorted(works))
        nodes = tuple(self.nodes)
        record = Record(
            plan, accepted, (), 1, nodes, (1,) * len(nodes), (), replace(EMPTY, audits=audits), (), (), (), ()
        )
        for one in (self.accused, self.auditor, self.peer):
            one.apply(record, one.gradient_of(record, {node: work.payload for node, work in works.items()}))
        return record

    def judge(
        self,
        plan: Plan,
        work: LocalUpdate,
        before: Plan | None = None,
        allowed_residuals: frozenset[bytes] | None = None,
    ) -> Finding:
        """What the auditor finds of the accused's work."""
        return self.judge_bundle(plan, work, self.bundle(plan), before, allowed_residuals)

    def bundle(self, plan: Plan) -> AuditBundle:
        """The accused's of that round."""
        bundles = self.accused.trace_recorder.bundles
        assert bundles is not None
        bundle = bundles.bundle(plan.round)
        assert bundle is not None
        return bundle

    def judge_bundle(
        self,
        plan: Plan,
        work: LocalUpdate,
        bundle: AuditBundle,
        before: Plan | None = None,
        allowed_residuals: frozenset[bytes] | None = None,
        *,
        jury: bool = False,
    ) -> Finding:
        bundles = self.accused.trace_recorder.bundles
        assert bundles is not None
        blobs = partial(bundles.read, plan.round)
        case = AuditCase(plan, self.accused.node, work.contribution, before, SEED, allowed_residuals, jury)
        return audit(self.auditor, case, bundle, blobs)


Make = Callable[..., Court]


def court(directory: Path, cache: Path, **changes: object) -> Court:
    """Three nodes at the beginning of a run; the text is prepared in ``cache``."""
    changes = {"rounds": ROUNDS, "audits": {"rate": 0.05}} | changes
    config = load_config(write_config(directory, members=2, **changes))
    config = config.model_copy(update={"node": config.node.model_copy(update={"cache": cache})})
    # The same ones every time: what each trains on, and what an auditor looks at, follows from their names.
    identities = [Identity(bytes([number]) * 32, directory / f"{number}.key") for number in (1, 2, 3)]
    manifest = launch(config, identities[0].peer_id).manifest
    accused, auditor, peer = (replica(manifest, config.node, one) for one in identities)
    accused.trace_recorder.bundles = AuditBundleStore(directory / "audits")
    return Court(manifest, config.node, directory, accused, auditor, peer)


def cheat(one: Replica, plan: Plan, tamper: Tamper) -> LocalUpdate:
    """The round's work, tampered with."""
    return one.train(plan, on_step=lambda step, loss, lr: tamper(one, step))


def trained(one: Replica) -> Tensor:
    flat = torch.empty(one.engine.layout.size)
    one.engine.read(flat)
    return flat


def at_the_end(change: Callable[[Replica, Tensor], Tensor]) -> Tamper:
    """Replace Δ, as a displacement of θ, after the last step."""

    def tamper(one: Replica, step: int) -> None:
        if step == STEPS - 1:
            theta = one.outer.theta
            one.engine.write(theta + change(one, trained(one) - theta))

    return tamper


def matched_noise(one: Replica, moved: Tensor) -> Tensor:
    """Random, of the norm that honest work has."""
    noise = torch.randn(moved.shape, generator=torch.Generator().manual_seed(1))
    return noise * (moved.norm() / noise.norm())


def train_lazily(one: Replica, plan: Plan, steps: int) -> LocalUpdate:
    """Only the first ``steps``, scaled to what all would have moved. Afterwards the engine works again."""
    step, taken = one.engine.step, [0]

    def lazy(batch: object, lr: float) -> float:
        taken[0] += 1
        return step(batch, lr) if taken[0] <= steps else 1.0  # type: ignore[arg-type]

    one.engine.step = lazy  # type: ignore[method-assign]
    try:
        return cheat(one, plan, at_the_end(lambda _, moved: moved * (STEPS / steps)))
    finally:
        one.engine.step = step  # type: ignore[method-assign]
