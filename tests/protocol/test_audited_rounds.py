"""What auditors say reaches the record while rounds go on, and who has answered is given work again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from psyche.protocol.audit_messages import Audit, DeclinedAudit, SealedVerdict
from psyche.protocol.audits import busy
from psyche.protocol.round_state import Rejected, StateAgreed
from psyche.protocol.wire import Body
from tests.protocol.audit_scenarios import PASS, said, verdict
from tests.protocol.one_leader import Table, root_after, started
from tests.protocol.test_audits import ALWAYS


@pytest.fixture
def table() -> Table:
    """Round 2 is planned, and of eight nodes half train in it: each contribution to round 1 is to be audited."""
    table, members = started(8, audits=ALWAYS, rounds=10)
    table.play_round(members)
    assert table.plan.round == 2
    assert len(table.plan.members) == 4
    return table


def auditor_of(table: Table) -> tuple[str, list[Audit]]:
    """One that sits round 2 out, and what it is asked for."""
    rounds, audit_state = table.state.rounds + 1, table.state.audit_state
    members = {member.node for member in table.plan.members}
    node = min(busy(audit_state, rounds, table.rules.audits) - members)
    return node, [audit for audit in audit_state.audits if audit.candidates[0] == node]


def say(table: Table, node: str, bodies: list[Body]) -> None:
    effects = [effect for body in bodies for effect in table.send(said(node, body))]  # type: ignore[arg-type]
    assert not [effect for effect in effects if isinstance(effect, Rejected)]


def until_certified(table: Table) -> None:
    members = [member.node for member in table.plan.members]
    table.close(members)
    table.exchange(members)
    table.certify(list(table.proposal.electorate))
    assert table.state.round is not None
    assert table.state.round.certified


def settle(table: Table) -> None:
    root, number = root_after(table.proposal), table.plan.round
    effects = [
        effect for node in list(table.state.peers) for effect in table.attest(node, root) if table.state.rounds < number
    ]
    assert StateAgreed(number, root) in [*effects, *table.effects]


def test_a_verdict_may_be_shown_as_soon_as_the_record_that_seals_it_is_certified(table: Table) -> None:
    """Its auditor has taken the outer step before this coordinator has heard from more than half of the members."""
    node, audits = auditor_of(table)
    full = [verdict(node, audit, PASS) for audit in audits]
    say(table, node, [SealedVerdict(one.accused, one.round, one.digest) for one in full])
    until_certified(table)
    assert table.state.rounds == 1
    say(table, node, list(full))
    settle(table)
    until_certified(table)
    found = [one for audit in table.proposal.audit_state.audits for one in audit.opinions if one.auditor == node]
    closed = [one for one in table.proposal.audit_state.closed if one.paid == (node,)]
    assert len(closed) + sum(one.finding is not None for one in found) == len(audits)


def test_who_declines_before_the_round_is_planned_is_a_member_of_it(table: Table) -> None:
    until_certified(table)
    node, _ = auditor_of(table)
    say(
        table,
        node,
        [
            DeclinedAudit(audit.accused, audit.round)
            for audit in table.proposal.audit_state.audits
            if node in audit.candidates[:1]
        ],
    )
    settle(table)
    assert table.plan.round == 3
    assert table.plan.member(node) is not None


def test_nothing_is_kept_of_what_no_record_can_hold(table: Table) -> None:
    node, audits = auditor_of(table)
    say(table, node, [DeclinedAudit(audit.accused, audit.round) for audit in audits])
    assert len(table.state.audit_statements) == len(audits)
    until_certified(table)
    settle(table)
    assert not table.state.audit_statements


def test_a_statement_on_an_audit_that_has_ended_is_forgotten(table: Table) -> None:
    """It came while the record that ends the audit was voted on, say."""
    node, audits = auditor_of(table)
    late = said(node, DeclinedAudit(audits[0].accused, 9))
    name = node, *late.key, late.body.DOMAIN
    table.state = replace(table.state, audit_statements={name: late})
    until_certified(table)
    settle(table)
    assert not table.state.audit_statements
