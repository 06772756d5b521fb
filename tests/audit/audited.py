"""A node whose round is audited, the auditor, and the tampering that each kind of cheating node does."""

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
"""Inner steps per round (H): the errors in REFERENCES were measured at this value."""
ROUNDS = {"total": 6, "inner_steps": STEPS, "start_members": 2}

SEED = b"seed"
"""Seed of the probes that auditors sample."""

Tamper = Callable[[Replica, int], None]
"""Called after every inner step, with its number."""


@dataclass
class AuditedRun:
    """One run with an audited node, its auditor and a third node to copy from."""

    manifest: Manifest
    settings: Node
    directory: Path
    audited: Replica
    auditor: Replica
    peer: Replica

    @property
    def nodes(self) -> list[str]:
        return sorted(one.node for one in (self.audited, self.auditor, self.peer))

    def plan(self) -> Plan:
        """Return the plan of the next round, with all three nodes."""
        chain = self.auditor.chain
        members = tuple(Member(node, self.auditor.run.rounds.inner_steps, 1) for node in self.nodes)
        seed = round_seed(chain.head)
        return Plan(chain.rounds + 1, 1, chain.head, chain.state_root, seed, chain.position, "gather", 0, members)

    def advance(self, plan: Plan, works: dict[str, LocalUpdate], audits: tuple[Audit, ...] = ()) -> Record:
        """Apply a record that accepts these contributions, with these audits open."""
        accepted = tuple(Accepted(node, works[node].contribution) for node in sorted(works))
        nodes = tuple(self.nodes)
        record = Record(
            plan, accepted, (), 1, nodes, (1,) * len(nodes), (), replace(EMPTY, audits=audits), (), (), (), ()
        )
        for one in (self.audited, self.auditor, self.peer):
            one.apply(record, one.gradient_of(record, {node: work.payload for node, work in works.items()}))
        return record

    def audit_work(
        self,
        plan: Plan,
        work: LocalUpdate,
        before: Plan | None = None,
        allowed_residuals: frozenset[bytes] | None = None,
    ) -> Finding:
        """Return the auditor's finding on the audited node's work."""
        return self.audit_bundle(plan, work, self.bundle(plan), before, allowed_residuals)

    def bundle(self, plan: Plan) -> AuditBundle:
        """Return the audit bundle of the audited node for that round."""
        bundles = self.audited.trace_recorder.bundles
        assert bundles is not None
        bundle = bundles.bundle(plan.round)
        assert bundle is not None
        return bundle

    def audit_bundle(
        self,
        plan: Plan,
        work: LocalUpdate,
        bundle: AuditBundle,
        before: Plan | None = None,
        allowed_residuals: frozenset[bytes] | None = None,
        *,
        jury: bool = False,
    ) -> Finding:
        bundles = self.audited.trace_recorder.bundles
        assert bundles is not None
        blobs = partial(bundles.read, plan.round)
        case = AuditCase(plan, self.audited.node, work.contribution, before, SEED, allowed_residuals, jury)
        return audit(self.auditor, case, bundle, blobs)


Make = Callable[..., AuditedRun]


def audited_run(directory: Path, cache: Path, **changes: object) -> AuditedRun:
    """Start a run of three nodes; the prepared text is shared through ``cache``."""
    changes = {"rounds": ROUNDS, "audits": {"rate": 0.05}} | changes
    config = load_config(write_config(directory, members=2, **changes))
    config = config.model_copy(update={"node": config.node.model_copy(update={"cache": cache})})
    # Fixed keys: data assignment and probes are derived from the PeerIDs.
    identities = [Identity(bytes([number]) * 32, directory / f"{number}.key") for number in (1, 2, 3)]
    manifest = launch(config, identities[0].peer_id).manifest
    audited, auditor, peer = (replica(manifest, config.node, one) for one in identities)
    audited.trace_recorder.bundles = AuditBundleStore(directory / "audits")
    return AuditedRun(manifest, config.node, directory, audited, auditor, peer)


def train_tampered(one: Replica, plan: Plan, tamper: Tamper) -> LocalUpdate:
    """Train the round with ``tamper`` called after every inner step."""
    return one.train(plan, on_step=lambda step, loss, lr: tamper(one, step))


def trained(one: Replica) -> Tensor:
    flat = torch.empty(one.engine.layout.size)
    one.engine.read(flat)
    return flat


def at_the_end(change: Callable[[Replica, Tensor], Tensor]) -> Tamper:
    """Return a tamper that replaces Δ, a displacement of θ, after the last step."""

    def tamper(one: Replica, step: int) -> None:
        if step == STEPS - 1:
            theta = one.outer.theta
            one.engine.write(theta + change(one, trained(one) - theta))

    return tamper


def matched_noise(one: Replica, moved: Tensor) -> Tensor:
    """Return random numbers with the norm of the honest update."""
    noise = torch.randn(moved.shape, generator=torch.Generator().manual_seed(1))
    return noise * (moved.norm() / noise.norm())


def train_lazily(one: Replica, plan: Plan, steps: int) -> LocalUpdate:
    """Train only the first ``steps`` and scale Δ to the full step count. The engine is restored afterwards."""
    step, count = one.engine.step, [0]

    def lazy(batch: object, lr: float) -> float:
        count[0] += 1
        return step(batch, lr) if count[0] <= steps else 1.0  # type: ignore[arg-type]

    one.engine.step = lazy  # type: ignore[method-assign]
    try:
        return train_tampered(one, plan, at_the_end(lambda _, moved: moved * (STEPS / steps)))
    finally:
        one.engine.step = step  # type: ignore[method-assign]
