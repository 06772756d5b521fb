"""Runs in one process with malicious nodes; rounds, audits, verdicts and credits are those of real nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from psyche.audit.simulated_audits import SimulatedAudits, VerdictPolicy, honest
from psyche.config import load_config
from psyche.diloco.audit_bundle import AuditBundleStore
from psyche.diloco.launch import launch
from psyche.diloco.reference import simulate_rounds
from psyche.diloco.replica import Replica
from psyche.exchange.rules import rules_of
from psyche.network.identity import Identity
from psyche.numerics.digest import digest
from psyche.protocol.audit_messages import Closed
from psyche.protocol.credits import CreditAccounts, fold
from psyche.protocol.messages import Record
from tests.slow.adversary.malicious_nodes import Cheat, Honest, Swarm
from tests.tiny import replica, write_config

STEPS = 10
AUDITS = {"rate": 0.2, "window": 40}
"""Four times the default rate, so that a short run has as many audits as a long one."""


@dataclass
class RunResult:
    """The outcome of a run."""

    records: list[Record] = field(default_factory=list)
    loss: float = 0.0
    """Held-out loss of the outer parameters, nats per token."""
    hostile: frozenset[str] = frozenset()
    credits: CreditAccounts | None = None
    """Final credits of all nodes, computed from the records alone."""

    @property
    def closed(self) -> list[Closed]:
        return [one for record in self.records for one in record.audit_state.closed]

    @property
    def banned(self) -> frozenset[str]:
        return frozenset(self.records[-1].audit_state.banned)

    def paid(self, nodes: Iterable[str]) -> int:
        """Return the sum of final credits of ``nodes``."""
        assert self.credits is not None
        return sum(self.credits.account(node).final for node in nodes)

    def first_outlier(self) -> dict[str, int]:
        """Return the round in which each node's payload was first reported as an outlier."""
        found: dict[str, int] = {}
        for record in self.records:
            for node in record.audit_state.suspects:
                found.setdefault(node, record.plan.round - 1)
        return found

    def convicted_in(self) -> dict[str, int]:
        """Return the round whose record convicted each node."""
        found: dict[str, int] = {}
        for record in self.records:
            for node in record.audit_state.banned:
                found.setdefault(node, record.plan.round)
        return found


Attack = Callable[[Cheat], None]
"""Configures a malicious node."""


def run(
    directory: Path,
    cache: Path,
    *,
    nodes: int,
    hostile: int,
    rounds: int,
    attack: Attack | None = None,
    policy: Callable[[frozenset[str]], VerdictPolicy] = lambda hostile: honest,
    from_round: int = 1,
    seed: int = 11,
    **changes: object,
) -> RunResult:
    """Simulate ``nodes``, the last ``hostile`` of which attack. Without ``attack`` they are honest, too."""
    rounds_config = {"total": rounds, "inner_steps": STEPS, "start_members": nodes, "probation": 3}
    settings = {"rounds": rounds_config, "audits": AUDITS, "seed": seed} | changes
    config = load_config(write_config(directory, members=nodes, **settings))
    config = config.model_copy(update={"node": config.node.model_copy(update={"cache": cache})})
    identities = sorted(
        (Identity(digest("adversary", bytes([seed, number])), directory / f"{number}.key") for number in range(nodes)),
        key=lambda one: one.peer_id,
    )
    manifest = launch(config, identities[0].peer_id).manifest
    swarm = Swarm(from_round)
    malicious = frozenset(one.peer_id for one in identities[nodes - hostile :]) if attack else frozenset()
    replicas: dict[str, Replica] = {}
    for identity in identities:
        kind = Cheat if identity.peer_id in malicious else Honest
        one = replica(manifest, config.node, identity, kind=kind)
        one.swarm = swarm  # type: ignore[attr-defined]
        one.trace_recorder.bundles = AuditBundleStore(directory / identity.peer_id / "audits")
        if attack is not None and isinstance(one, Cheat):
            attack(one)
        replicas[identity.peer_id] = one
    result = RunResult(hostile=malicious)
    audits = SimulatedAudits(replicas, manifest.run_id, rules_of(manifest).audits, policy(malicious))
    for record, _ in simulate_rounds(manifest, replicas, audit=audits.statements_after):
        result.records.append(record)
    result.credits = fold(rules_of(manifest), result.records)
    result.loss = heldout_loss(replicas[identities[0].peer_id])
    return result


def heldout_loss(one: Replica) -> float:
    """Return the loss on the whole held-out set, nats per token."""
    with torch.no_grad():
        total, tokens = one.heldout_loss(0, 1)
    return total / tokens
