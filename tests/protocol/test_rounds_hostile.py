"""One malicious member costs the others a deadline at most, never the run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from psyche.protocol.round_state import (
    Abandoned,
    Arrived,
    Attested,
    Fetched,
    Left,
    Phase,
    Planned,
    Promised,
    Restored,
    Stage,
    StateAgreed,
)
from psyche.protocol.wire import MAX_MEMBERS
from tests.protocol.one_leader import GENESIS, RULES, Leader, nodes, peer_id, rejected, root_after, started

LONG = 4 * (RULES.round_bounds[1] + 3 * RULES.exchange_bounds[1])
"""Seconds in which every stage of a round can reach its longest deadline several times."""


def honest_turn(leader: Leader, honest: list[str]) -> None:
    """Let every honest member do what is due, as its worker would on reading the run status."""
    current = leader.state.round
    if current is None:
        return
    number = current.plan.round
    members = [m.node for m in current.plan.members if m.node in honest]
    for node in members:
        current = leader.state.round
        if current is None or current.plan.round != number:
            return
        if current.stage is Stage.COMMITTING:
            if node not in current.commitments:
                leader.commit(node)
        elif node in current.commitments and node not in current.contributions:
            leader.reveal(node)
    for node in members:
        current = leader.state.round
        if current is None or current.plan.round != number or current.stage is Stage.COMMITTING:
            return
        fetchable = {author for author in current.contributions if author in honest}
        if current.holdings.get(node) != fetchable:
            leader.hold(node, fetchable)
    for node in members:
        current = leader.state.round
        if current is None or current.plan.round != number:
            return
        if current.proposal is not None and not current.certified and node not in current.votes:
            accepted = {a.node for a in current.proposal.accepted}
            if node in current.proposal.electorate and accepted <= current.holdings.get(node, frozenset()):
                leader.vote(node)
        current = leader.state.round
        if current is not None and current.certified and node not in current.attestations:
            leader.attest(node)


def live(leader: Leader, honest: list[str], hostile, seconds: float = LONG) -> None:
    """Let time pass; honest members do what is due, and ``hostile(leader)`` acts."""
    until = leader.now + seconds
    while leader.now < until and leader.state.phase is not Phase.FINISHED:
        hostile(leader)
        honest_turn(leader, honest)
        leader.wait(1)


def committing(leader: Leader, node: str) -> None:
    current = leader.state.round
    if current is not None and current.stage is Stage.COMMITTING and node not in current.commitments:
        leader.commit(node)


def revealing(leader: Leader, node: str) -> None:
    committing(leader, node)
    current = leader.state.round
    if current is not None and current.stage is not Stage.COMMITTING and node not in current.contributions:
        leader.reveal(node)


def claiming_nothing(leader: Leader, node: str) -> None:
    revealing(leader, node)
    current = leader.state.round
    if current is not None and current.stage is not Stage.COMMITTING:
        leader.hold(node, [])


def claiming_everything(leader: Leader, node: str) -> None:
    revealing(leader, node)
    current = leader.state.round
    if current is not None and current.stage is not Stage.COMMITTING:
        leader.hold(node, [m.node for m in current.plan.members])


def voting_every_other_term(leader: Leader, node: str) -> None:
    claiming_everything(leader, node)
    current = leader.state.round
    if (
        current is not None
        and current.proposal is not None
        and not current.certified
        and current.term % 2
        and node in current.proposal.electorate
    ):
        leader.vote(node)


def attesting_early_and_wrong(leader: Leader, node: str) -> None:
    voting_every_other_term(leader, node)
    current = leader.state.round
    if current is not None:
        leader.send(Attested(node, current.plan.round, b"w" * 32))


def flapping(leader: Leader, node: str) -> None:
    leader.send(Left(node, "bye"))
    leader.send(Arrived(node, GENESIS if int(leader.now) % 2 else leader.state.state_root, "cpu", leader.state.rounds))


def silent(leader: Leader, node: str) -> None:
    """Stay connected and do nothing."""


BEHAVIOURS = [
    silent,
    committing,
    revealing,
    claiming_nothing,
    claiming_everything,
    voting_every_other_term,
    attesting_early_and_wrong,
    flapping,
]


@pytest.mark.parametrize("count", [3, 4, 5, 7])
@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda b: b.__name__)
def test_one_malicious_member_does_not_stop_a_run(count: int, behaviour) -> None:
    leader, members = started(count, rounds=4)
    hostile = members[1]
    honest = [node for node in members if node != hostile]
    live(leader, honest, lambda t: behaviour(t, hostile), seconds=4 * LONG)
    assert leader.state.phase is Phase.FINISHED, leader.state.note
    for record in leader.certified.values():
        accepted = {one.node for one in record.accepted}
        assert accepted >= set(honest) & {m.node for m in record.plan.members}
    settled = [effect for effect in leader.effects if isinstance(effect, StateAgreed)]
    assert [s.state_root for s in settled] == [root_after(leader.certified[s.round]) for s in settled]


@pytest.mark.parametrize("behaviour", [silent, committing, revealing, claiming_nothing, claiming_everything])
def test_of_two_members_an_inactive_one_does_not_stop_the_other(behaviour) -> None:
    leader, members = started(2, rounds=3)
    live(leader, members[:1], lambda t: behaviour(t, members[1]), seconds=4 * LONG)
    assert leader.state.phase is Phase.FINISHED, leader.state.note


def test_a_member_that_delays_its_messages_does_not_set_the_next_deadline() -> None:
    """The first exchange may take as long as the manifest allows; the later ones follow the honest majority."""
    leader, members = started(4, rounds=999)
    hostile, honest = members[0], members[1:]
    live(leader, honest, lambda t: revealing(t, hostile), seconds=120)
    before = len(leader.certified)
    assert before >= 1
    live(leader, honest, lambda t: revealing(t, hostile), seconds=100)
    least = RULES.exchange_bounds[0]
    assert len(leader.certified) - before >= 100 // (4 * least)


def test_members_that_commit_at_once_do_not_shorten_the_deadline() -> None:
    leader, members = started(5, rounds=99)
    for _ in range(6):
        leader.commit(members[0])
        leader.commit(members[1])
        leader.wait(40)
        leader.commit_all(members[2:])
        leader.exchange(members)
        leader.certify(members)
        leader.attest_all(members)
    assert leader.state.round.deadline - leader.state.round.opened >= 40


def test_a_deadline_that_all_members_miss_is_extended() -> None:
    """All become slower than the last deadline allows: the run must not restart the round forever."""
    leader, members = started(4, rounds=99)
    for _ in range(3):
        leader.wait(12)
        leader.run_round(members)
    assert leader.state.round.deadline - leader.state.round.opened < 40
    opened = leader.state.round.opened
    for _ in range(400):
        leader.wait(1)
        current = leader.state.round
        if current.plan.round == 4 and leader.now - current.opened >= 40:
            leader.run_round(members)
            break
    assert 4 in leader.certified
    assert leader.now - opened < 300


def test_attestations_before_the_record_is_certified_are_refused() -> None:
    leader, members = started()
    leader.commit_all(members)
    assert "too-early:" in rejected(leader.send(Attested(members[0], 1, b"w" * 32)))
    leader.exchange(members)
    assert "too-early:" in rejected(leader.send(Attested(members[0], 1, b"w" * 32)))
    assert leader.state.peers[members[0]].state_root == GENESIS


def test_payloads_held_only_by_members_that_left_are_unavailable() -> None:
    leader, members = started(6)
    leader.commit_all(members)
    for node in members:
        leader.reveal(node)
    for node in members[2:5]:
        leader.hold(node, [members[0], *members[2:]])
    for node in members[:2]:
        leader.hold(node, members)
        leader.send(Left(node, "bye"))
    leader.hold(members[5], [members[1], members[5]])
    leader.wait(51)
    assert members[1] not in [a.node for a in leader.proposal.accepted]


def test_holdings_are_kept_for_members_only() -> None:
    leader, members = started()
    leader.commit_all(members)
    leader.send(Fetched(members[0], 1, frozenset(peer_id(n) for n in range(100, 400))))
    assert leader.state.round.holdings[members[0]] <= set(members)


def test_a_plan_has_at_most_the_largest_number_of_members() -> None:
    crowd = nodes(MAX_MEMBERS + 10)
    leader = Leader(replace(RULES, start_members=len(crowd)))
    from psyche.protocol.rounds import tick

    state = leader.state
    peers = {node: tick(RULES, state, Arrived(node, GENESIS, "cpu", 0), 0.0)[0].peers[node] for node in crowd}
    promises = {node: Promised(node, state.lead_term, 0) for node in crowd}
    state = replace(state, peers=peers, promises=promises)
    _, effects = tick(replace(leader.rules, start_members=1), state, Arrived(crowd[0], GENESIS, "cpu", 0), 0.0)
    (planned,) = (effect for effect in effects if isinstance(effect, Planned))
    assert len(planned.plan.members) == MAX_MEMBERS
    assert [m.node for m in planned.plan.members] == sorted(m.node for m in planned.plan.members)


def test_an_earlier_certificate_ends_a_round_opened_after_a_restart() -> None:
    """A restarted coordinator first meets new nodes and opens round 1.

    Then a member sends the certificate of round 2.
    """
    old, members = started(rounds=9)
    old.run_round(members)
    old.run_round(members)
    new = Leader(replace(old.rules, start_members=1))
    (planned,) = new.arrive([peer_id(90)], GENESIS)
    assert planned.plan.round == 1
    (abandoned,) = new.send(Restored(old.certified[2]))
    assert isinstance(abandoned, Abandoned)
    assert new.state.rounds == 2
    assert new.state.round is None
    new.arrive(members, old.state.state_root)
    assert new.plan.round == 3
    assert new.plan.previous == old.certified[2].hash


def test_the_certificate_of_the_round_in_progress_changes_nothing() -> None:
    """A member returns while the others attest, and sends the certificate this coordinator has just made."""
    leader, members = started()
    leader.commit_all(members)
    leader.exchange(members)
    leader.certify(members)
    before = leader.state
    leader.send(Restored(leader.certified[1]))
    assert leader.state == before


def test_a_paused_run_names_the_members_it_waits_for() -> None:
    leader, members = started(4)
    leader.commit_all(members)
    leader.exchange(members)
    leader.certify(members)
    right = root_after(leader.proposal)
    leader.attest(members[0], right)
    leader.attest(members[1], right)
    leader.wait(60)  # the others stay connected but do not attest
    assert leader.state.phase is Phase.PAUSED
    assert members[2][-6:] in leader.state.note
    assert members[3][-6:] in leader.state.note
    leader.attest(members[2], right)
    assert leader.state.rounds == 1
