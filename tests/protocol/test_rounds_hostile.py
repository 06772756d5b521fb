"""One member that does its worst: the others lose a deadline at most, and never the run."""

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
from tests.protocol.one_leader import GENESIS, RULES, Table, nodes, peer_id, rejected, root_after, started

LONG = 4 * (RULES.round_bounds[1] + 3 * RULES.exchange_bounds[1])
"""Seconds in which every stage of a round can run into its longest deadline, several times over."""


def honest_turn(table: Table, honest: list[str]) -> None:
    """Every honest member does whatever is due, as its worker would on reading the board."""
    current = table.state.round
    if current is None:
        return
    number = current.plan.round
    members = [m.node for m in current.plan.members if m.node in honest]
    for node in members:
        current = table.state.round
        if current is None or current.plan.round != number:
            return
        if current.stage is Stage.COMMITTING:
            if node not in current.commitments:
                table.commit(node)
        elif node in current.commitments and node not in current.contributions:
            table.open(node)
    for node in members:
        current = table.state.round
        if current is None or current.plan.round != number or current.stage is Stage.COMMITTING:
            return
        fetchable = {author for author in current.contributions if author in honest}
        if current.holdings.get(node) != fetchable:
            table.hold(node, fetchable)
    for node in members:
        current = table.state.round
        if current is None or current.plan.round != number:
            return
        if current.proposal is not None and not current.certified and node not in current.votes:
            accepted = {a.node for a in current.proposal.accepted}
            if node in current.proposal.electorate and accepted <= current.holdings.get(node, frozenset()):
                table.vote(node)
        current = table.state.round
        if current is not None and current.certified and node not in current.attestations:
            table.attest(node)


def live(table: Table, honest: list[str], hostile, seconds: float = LONG) -> None:
    """Time passes; the honest do what is due, and ``hostile(table)`` what it likes."""
    until = table.now + seconds
    while table.now < until and table.state.phase is not Phase.FINISHED:
        hostile(table)
        honest_turn(table, honest)
        table.wait(1)


def committing(table: Table, node: str) -> None:
    current = table.state.round
    if current is not None and current.stage is Stage.COMMITTING and node not in current.commitments:
        table.commit(node)


def opening(table: Table, node: str) -> None:
    committing(table, node)
    current = table.state.round
    if current is not None and current.stage is not Stage.COMMITTING and node not in current.contributions:
        table.open(node)


def claiming_nothing(table: Table, node: str) -> None:
    opening(table, node)
    current = table.state.round
    if current is not None and current.stage is not Stage.COMMITTING:
        table.hold(node, [])


def claiming_everything(table: Table, node: str) -> None:
    opening(table, node)
    current = table.state.round
    if current is not None and current.stage is not Stage.COMMITTING:
        table.hold(node, [m.node for m in current.plan.members])


def voting_every_other_term(table: Table, node: str) -> None:
    claiming_everything(table, node)
    current = table.state.round
    if (
        current is not None
        and current.proposal is not None
        and not current.certified
        and current.term % 2
        and node in current.proposal.electorate
    ):
        table.vote(node)


def attesting_early_and_wrong(table: Table, node: str) -> None:
    voting_every_other_term(table, node)
    current = table.state.round
    if current is not None:
        table.send(Attested(node, current.plan.round, b"w" * 32))


def flapping(table: Table, node: str) -> None:
    table.send(Left(node, "bye"))
    table.send(Arrived(node, GENESIS if int(table.now) % 2 else table.state.state_root, "cpu", table.state.rounds))


def silent(table: Table, node: str) -> None:
    """Here, and that is all."""


BEHAVIOURS = [
    silent,
    committing,
    opening,
    claiming_nothing,
    claiming_everything,
    voting_every_other_term,
    attesting_early_and_wrong,
    flapping,
]


@pytest.mark.parametrize("count", [3, 4, 5, 7])
@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda b: b.__name__)
def test_one_hostile_member_does_not_stop_a_run(count: int, behaviour) -> None:
    table, members = started(count, rounds=4)
    hostile = members[1]
    honest = [node for node in members if node != hostile]
    live(table, honest, lambda t: behaviour(t, hostile), seconds=4 * LONG)
    assert table.state.phase is Phase.FINISHED, table.state.note
    for record in table.certified.values():
        accepted = {one.node for one in record.accepted}
        assert accepted >= set(honest) & {m.node for m in record.plan.members}
    settled = [effect for effect in table.effects if isinstance(effect, StateAgreed)]
    assert [s.state_root for s in settled] == [root_after(table.certified[s.round]) for s in settled]


@pytest.mark.parametrize("behaviour", [silent, committing, opening, claiming_nothing, claiming_everything])
def test_of_two_members_one_that_does_nothing_does_not_stop_the_other(behaviour) -> None:
    table, members = started(2, rounds=3)
    live(table, members[:1], lambda t: behaviour(t, members[1]), seconds=4 * LONG)
    assert table.state.phase is Phase.FINISHED, table.state.note


def test_who_holds_back_its_word_does_not_set_the_next_deadline() -> None:
    """The first exchange may take as long as the manifest allows; the later ones follow the honest majority."""
    table, members = started(4, rounds=999)
    hostile, honest = members[0], members[1:]
    live(table, honest, lambda t: opening(t, hostile), seconds=120)
    before = len(table.certified)
    assert before >= 1
    live(table, honest, lambda t: opening(t, hostile), seconds=100)
    least = RULES.exchange_bounds[0]
    assert len(table.certified) - before >= 100 // (4 * least)


def test_one_that_commits_in_no_time_does_not_rush_the_others() -> None:
    table, members = started(5, rounds=99)
    for _ in range(6):
        table.commit(members[0])
        table.commit(members[1])
        table.wait(40)
        table.close(members[2:])
        table.exchange(members)
        table.certify(members)
        table.settle(members)
    assert table.state.round.deadline - table.state.round.opened >= 40


def test_a_deadline_nobody_can_keep_is_not_set_twice() -> None:
    """All become slower than the last deadline allows: the run must notice, not start the round again for ever."""
    table, members = started(4, rounds=99)
    for _ in range(3):
        table.wait(12)
        table.play_round(members)
    assert table.state.round.deadline - table.state.round.opened < 40
    opened = table.state.round.opened
    for _ in range(400):
        table.wait(1)
        current = table.state.round
        if current.plan.round == 4 and table.now - current.opened >= 40:
            table.play_round(members)
            break
    assert 4 in table.certified
    assert table.now - opened < 300


def test_attestations_before_the_record_is_certified_are_refused() -> None:
    table, members = started()
    table.close(members)
    assert "too-early:" in rejected(table.send(Attested(members[0], 1, b"w" * 32)))
    table.exchange(members)
    assert "too-early:" in rejected(table.send(Attested(members[0], 1, b"w" * 32)))
    assert table.state.peers[members[0]].state_root == GENESIS


def test_those_who_left_hold_nothing() -> None:
    """A payload claimed by members that went away since cannot be fetched from them."""
    table, members = started(6)
    table.close(members)
    for node in members:
        table.open(node)
    for node in members[2:5]:
        table.hold(node, [members[0], *members[2:]])
    for node in members[:2]:
        table.hold(node, members)
        table.send(Left(node, "bye"))
    table.hold(members[5], [members[1], members[5]])
    table.wait(51)
    assert members[1] not in [a.node for a in table.proposal.accepted]


def test_holdings_are_kept_for_members_only() -> None:
    table, members = started()
    table.close(members)
    table.send(Fetched(members[0], 1, frozenset(peer_id(n) for n in range(100, 400))))
    assert table.state.round.holdings[members[0]] <= set(members)


def test_a_crowd_does_not_make_a_plan_too_large_to_send() -> None:
    crowd = nodes(MAX_MEMBERS + 10)
    table = Table(replace(RULES, start_members=len(crowd)))
    from psyche.protocol.rounds import tick

    state = table.state
    peers = {node: tick(RULES, state, Arrived(node, GENESIS, "cpu", 0), 0.0)[0].peers[node] for node in crowd}
    promises = {node: Promised(node, state.lead_term, 0) for node in crowd}
    state = replace(state, peers=peers, promises=promises)
    _, effects = tick(replace(table.rules, start_members=1), state, Arrived(crowd[0], GENESIS, "cpu", 0), 0.0)
    (planned,) = (effect for effect in effects if isinstance(effect, Planned))
    assert len(planned.plan.members) == MAX_MEMBERS
    assert [m.node for m in planned.plan.members] == sorted(m.node for m in planned.plan.members)


def test_a_certificate_from_before_a_restart_ends_a_round_opened_in_ignorance() -> None:
    """A restarted coordinator met newcomers first and opened round 1 with them; then a member shows round 2."""
    old, members = started(rounds=9)
    old.play_round(members)
    old.play_round(members)
    new = Table(replace(old.rules, start_members=1))
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
    """A member comes back while the others still attest, and shows what this coordinator itself certified."""
    table, members = started()
    table.close(members)
    table.exchange(members)
    table.certify(members)
    before = table.state
    table.send(Restored(table.certified[1]))
    assert table.state == before


def test_a_paused_run_says_for_whom_it_waits() -> None:
    table, members = started(4)
    table.close(members)
    table.exchange(members)
    table.certify(members)
    right = root_after(table.proposal)
    table.attest(members[0], right)
    table.attest(members[1], right)
    table.wait(60)  # the others are here, and silent
    assert table.state.phase is Phase.PAUSED
    assert members[2][-6:] in table.state.note
    assert members[3][-6:] in table.state.note
    table.attest(members[2], right)
    assert table.state.rounds == 1
