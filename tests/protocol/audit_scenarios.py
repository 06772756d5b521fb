"""Rounds in which nothing happens but audits: contributions by name, auditors by what they say."""

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

Says = Callable[[str, Audit], Finding | None]
"""What an auditor finds; None: it never answers."""


def signed(node: str, round_number: int, body: Body) -> bytes:
    """An envelope with no true signature."""
    return encode_envelope(Envelope(body.DOMAIN, RUN_ID, round_number, node, body.encode(), bytes(64)))


def verdict(node: str, audit: Audit, finding: Finding) -> Verdict:
    return Verdict(audit.accused, audit.round, finding, digest("salt", node.encode(), audit.accused.encode()))


def said(node: str, body: AuditStatement) -> StatementReceived:
    return StatementReceived(node, body, signed(node, body.round, body))


@dataclass
class Court:
    """A run's dockets, round by round."""

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
    """Who contributes nothing."""

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

    def next(self, statements: Sequence[StatementReceived], private: Sequence[str] = ()) -> AuditState:
        """One round. Raises ``InvalidAudits``."""
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

    def play(self, rounds: int, says: Says) -> None:
        """Rounds in which whoever is asked answers at once, and shows its verdict as soon as it may."""
        for _ in range(rounds):
            statements = [
                said(node, body)
                for audit in self.audit_state.audits
                for node in audit.candidates
                if node not in self.audit_state.banned and (body := self._word(node, audit, says)) is not None
            ]
            self.next(list(admissible(self.audit_state, statements, self.round + 1, self.rules.audits)))

    def _word(self, node: str, audit: Audit, says: Says) -> SealedVerdict | Verdict | None:
        mine = next((one for one in audit.opinions if one.auditor == node), None)
        if (mine is None and node not in asked(audit, self.round + 1, self.rules.audits)) or (mine and mine.finding):
            return None
        finding = says(node, audit)
        if finding is None:
            return None
        full = verdict(node, audit, finding)
        return SealedVerdict(audit.accused, audit.round, full.digest) if mine is None else full

    def _work(self, node: str, plan: Plan, private: bool) -> Contribution:
        return contribution(node, plan, self.rules, private=private)
