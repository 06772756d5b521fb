"""Runs in one process, some of whose nodes lie: rounds, audits, verdicts and credits by the code of real nodes."""

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
from tests.slow.adversary.cheats import Cheat, Honest, Swarm
from tests.tiny import replica, write_config

STEPS = 10
AUDITS = {"rate": 0.2, "window": 40}
"""Four times the usual rate, so that a run of a minute has as many audits as one of an hour."""


@dataclass
class Ran:
    """What came of a run."""

    records: list[Record] = field(default_factory=list)
    loss: float = 0.0
    """Of the outer parameters on the held-out set, nats a token."""
    hostile: frozenset[str] = frozenset()
    credits: CreditAccounts | None = None
    """What everybody is paid in the end, from the records alone."""

    @property
    def closed(self) -> list[Closed]:
        return [one for record in self.records for one in record.audit_state.closed]

    @property
    def banned(self) -> frozenset[str]:
        return frozenset(self.records[-1].audit_state.banned)

    def paid(self, nodes: Iterable[str]) -> int:
        """Credits of ``nodes`` that are final."""
        assert self.credits is not None
        return sum(self.credits.account(node).final for node in nodes)

    def named_in(self) -> dict[str, int]:
        """Round whose payload of each stood out first."""
        found: dict[str, int] = {}
        for record in self.records:
            for node in record.audit_state.suspects:
                found.setdefault(node, record.plan.round - 1)
        return found

    def convicted_in(self) -> dict[str, int]:
        """Round in whose record each was convicted."""
        found: dict[str, int] = {}
        for record in self.records:
            for node in record.audit_state.banned:
                found.setdefault(node, record.plan.round)
        return found


Arm = Callable[[Cheat], None]
"""Makes a hostile node what it is."""


def run(
    directory: Path,
    cache: Path,
    *,
    nodes: int,
    hostile: int,
    rounds: int,
    arm: Arm | None = None,
    judge: Callable[[frozenset[str]], VerdictPolicy] = lambda hostile: honest,
    from_round: int = 1,
    seed: int = 11,
    **changes: object,
) -> Ran:
    """A run of ``nodes``, the last ``hostile`` of which are armed; without ``arm`` they are honest, too."""
    shape = {"total": rounds, "inner_steps": STEPS, "start_members": nodes, "probation": 3}
    settings = {"rounds": shape, "audits": AUDITS, "seed": seed} | changes
    config = load_config(write_config(directory, members=nodes, **settings))
    config = config.model_copy(update={"node": config.node.model_copy(update={"cache": cache})})
    identities = sorted(
        (Identity(digest("adversary", bytes([seed, number])), directory / f"{number}.key") for number in range(nodes)),
        key=lambda one: one.peer_id,
    )
    manifest = launch(config, identities[0].peer_id).manifest
    swarm = Swarm(from_round)
    liars = frozenset(one.peer_id for one in identities[nodes - hostile :]) if arm else frozenset()
    replicas: dict[str, Replica] = {}
    for identity in identities:
        kind = Cheat if identity.peer_id in liars else Honest
        one = replica(manifest, config.node, identity, kind=kind)
        one.swarm = swarm  # type: ignore[attr-defined]
        one.trace_recorder.bundles = AuditBundleStore(directory / identity.peer_id / "audits")
        if arm is not None and isinstance(one, Cheat):
            arm(one)
        replicas[identity.peer_id] = one
    ran = Ran(hostile=liars)
    audits = SimulatedAudits(replicas, manifest.run_id, rules_of(manifest).audits, judge(liars))
    for record, _ in simulate_rounds(manifest, replicas, audit=audits.statements_after):
        ran.records.append(record)
    ran.credits = fold(rules_of(manifest), ran.records)
    ran.loss = heldout_loss(replicas[identities[0].peer_id])
    return ran


def heldout_loss(one: Replica) -> float:
    """Nats a token, on the whole held-out set."""
    with torch.no_grad():
        total, tokens = one.heldout_loss(0, 1)
    return total / tokens
