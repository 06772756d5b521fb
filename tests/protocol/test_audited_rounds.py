"""Audit statements reach the record while rounds continue, and auditors that answered are assigned work again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from psyche.protocol.audit_messages import Audit, DeclinedAudit, SealedVerdict
from psyche.protocol.audits import busy
from psyche.protocol.round_state import Rejected, StateAgreed
from psyche.protocol.wire import Body
from tests.protocol.audit_scenarios import PASS, received, verdict
from tests.protocol.one_leader import Leader, root_after, started
from tests.protocol.test_audits import ALWAYS


@pytest.fixture
def leader() -> Leader:
    """Round 2 is planned with half of eight nodes; the others audit, each contribution to round 1 being audited."""
    leader, members = started(8, audits=ALWAYS, rounds=10)
    leader.run_round(members)
    assert leader.plan.round == 2
    assert len(leader.plan.members) == 4
    return leader


def auditor_of(leader: Leader) -> tuple[str, list[Audit]]:
    """Return a node that sits out round 2, and the audits assigned to it."""
    rounds, audit_state = leader.state.rounds + 1, leader.state.audit_state
    members = {member.node for member in leader.plan.members}
    node = min(busy(audit_state, rounds, leader.rules.audits) - members)
    return node, [audit for audit in audit_state.audits if audit.candidates[0] == node]


def send_statements(leader: Leader, node: str, bodies: list[Body]) -> None:
    effects = [effect for body in bodies for effect in leader.send(received(node, body))]  # type: ignore[arg-type]
    assert not [effect for effect in effects if isinstance(effect, Rejected)]


def until_certified(leader: Leader) -> None:
    members = [member.node for member in leader.plan.members]
    leader.commit_all(members)
    leader.exchange(members)
    leader.certify(list(leader.proposal.electorate))
    assert leader.state.round is not None
    assert leader.state.round.certified


def attest_all(leader: Leader) -> None:
    root, number = root_after(leader.proposal), leader.plan.round
    effects = [
        effect
        for node in list(leader.state.peers)
        for effect in leader.attest(node, root)
        if leader.state.rounds < number
    ]
    assert StateAgreed(number, root) in [*effects, *leader.effects]


def test_a_verdict_may_be_revealed_once_the_record_that_seals_it_is_certified(leader: Leader) -> None:
    """Its auditor may apply the record before the coordinator has heard from half of the members."""
    node, audits = auditor_of(leader)
    full = [verdict(node, audit, PASS) for audit in audits]
    send_statements(leader, node, [SealedVerdict(one.accused, one.round, one.digest) for one in full])
    until_certified(leader)
    assert leader.state.rounds == 1
    send_statements(leader, node, list(full))
    attest_all(leader)
    until_certified(leader)
    found = [one for audit in leader.proposal.audit_state.audits for one in audit.opinions if one.auditor == node]
    closed = [one for one in leader.proposal.audit_state.closed if one.paid == (node,)]
    assert len(closed) + sum(one.finding is not None for one in found) == len(audits)


def test_a_node_that_declines_before_the_round_is_planned_trains_in_it(leader: Leader) -> None:
    until_certified(leader)
    node, _ = auditor_of(leader)
    send_statements(
        leader,
        node,
        [
            DeclinedAudit(audit.accused, audit.round)
            for audit in leader.proposal.audit_state.audits
            if node in audit.candidates[:1]
        ],
    )
    attest_all(leader)
    assert leader.plan.round == 3
    assert leader.plan.member(node) is not None


def test_statements_that_no_record_can_hold_are_dropped(leader: Leader) -> None:
    node, audits = auditor_of(leader)
    send_statements(leader, node, [DeclinedAudit(audit.accused, audit.round) for audit in audits])
    assert len(leader.state.audit_statements) == len(audits)
    until_certified(leader)
    attest_all(leader)
    assert not leader.state.audit_statements


def test_a_statement_on_a_closed_audit_is_dropped(leader: Leader) -> None:
    """For instance, it arrived during the vote on the record that closes the audit."""
    node, audits = auditor_of(leader)
    late = received(node, DeclinedAudit(audits[0].accused, 9))
    name = node, *late.key, late.body.DOMAIN
    leader.state = replace(leader.state, audit_statements={name: late})
    until_certified(leader)
    attest_all(leader)
    assert not leader.state.audit_statements
