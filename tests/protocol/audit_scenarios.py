"""Rounds that only contribute and audit: contributions by node name, verdicts by a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from psyche.numerics.digest import digest
from psyche.protocol.audit_messages import (
    EMPTY,
    Audit,
    AuditState,
    AuditStatement,
    Closed,
    Finding,
    SealedVerdict,
    Verdict,
)
from psyche.protocol.audits import admissible, asked, audits_after
from psyche.protocol.messages import Accepted, Contribution, Member, Plan, Standing
from psyche.protocol.proposals import round_seed
from psyche.protocol.round_state import Rules, StatementReceived
from psyche.protocol.standing import founding_weights, standing_after, weights_of
from psyche.protocol.wire import Body, Envelope, encode_envelope
from tests.protocol.one_leader import GENESIS, RUN_ID, contribution

PASS = Finding("measured", 1_000, 0, 5)
FAIL = Finding("measured", 700_000, 1, 0)
UNSURE = Finding("measured", 30_000, 0, 1)
FALSE = Finding("false", 0, 0, 0)
UNSERVED = Finding("unserved", 0, 0, 0)

FindingPolicy = Callable[[str, Audit], Finding | None]
"""Returns what an auditor finds, or None if it never answers."""


def signed(node: str, round_number: int, body: Body) -> bytes:
    """Return an envelope with a dummy signature."""
    return encode_envelope(Envelope(body.DOMAIN, RUN_ID, round_number, node, body.encode(), bytes(64)))


def verdict(node: str, audit: Audit, finding: Finding) -> Verdict:
    return Verdict(audit.accused, audit.round, finding, digest("salt", node.encode(), audit.accused.encode()))


def received(node: str, body: AuditStatement) -> StatementReceived:
    return StatementReceived(node, body, signed(node, body.round, body))


@dataclass
class AuditedRounds:
    """The audit state of a run, round by round."""

    nodes: Sequence[str]
    rules: Rules
    round: int = 0
    head: bytes = RUN_ID
    audit_state: AuditState = EMPTY
    standing: tuple[Standing, ...] = ()
    closed: list[Closed] = field(default_factory=list)
    opened: list[Audit] = field(default_factory=list)
    suspects: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()
    """Nodes that contribute nothing."""

    @property
    def members(self) -> list[str]:
        return [node for node in self.nodes if node not in self.audit_state.banned and node not in self.silent]

    @property
    def weights(self) -> dict[str, int]:
        """Voting weights in the next round."""
        return weights_of(self.standing) or founding_weights(self.nodes)

    def plan(self) -> Plan:
        weights = self.weights
        members = tuple(Member(node, self.rules.inner_steps, weights.get(node, 0)) for node in self.members)
        return Plan(self.round + 1, self.round + 1, self.head, GENESIS, round_seed(self.head), 0, "gather", 0, members)

    def run_round(self, statements: Sequence[StatementReceived], private: Sequence[str] = ()) -> AuditState:
        """Run one round. Raises ``InvalidAudits``."""
        plan = self.plan()
        given = tuple(Accepted(node, self._work(node, plan, node in private)) for node in self.members)
        after = audits_after(
            self.audit_state,
            self.standing,
            statements,
            plan=plan,
            accepted=given,
            electorate=self.weights,
            suspects=self.suspects & {one.node for one in self.audit_state.pool.given},
            rules=self.rules,
        )
        self.standing = standing_after(
            self.standing,
            plan=plan,
            electorate=self.weights,
            accepted=given,
            audit_state=after,
            audits_before=self.audit_state,
            rules=self.rules,
        )
        self.round, self.head = plan.round, digest("court", self.head, *after.statements)
        self.audit_state = after
        self.closed += after.closed
        self.opened += [audit for audit in after.audits if audit.since == plan.round and not audit.opinions]
        return after

    def run_rounds(self, rounds: int, policy: FindingPolicy) -> None:
        """Run rounds in which auditors answer at once and reveal their verdicts as soon as allowed."""
        for _ in range(rounds):
            statements = [
                received(node, body)
                for audit in self.audit_state.audits
                for node in audit.candidates
                if node not in self.audit_state.banned and (body := self._statement(node, audit, policy)) is not None
            ]
            self.run_round(list(admissible(self.audit_state, statements, self.round + 1, self.rules.audits)))

    def _statement(self, node: str, audit: Audit, policy: FindingPolicy) -> SealedVerdict | Verdict | None:
        mine = next((one for one in audit.opinions if one.auditor == node), None)
        if (mine is None and node not in asked(audit, self.round + 1, self.rules.audits)) or (mine and mine.finding):
            return None
        finding = policy(node, audit)
        if finding is None:
            return None
        full = verdict(node, audit, finding)
        return SealedVerdict(audit.accused, audit.round, full.digest) if mine is None else full

    def _work(self, node: str, plan: Plan, private: bool) -> Contribution:
        return contribution(node, plan, self.rules, private=private)
