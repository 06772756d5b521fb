"""Probation: a newcomer's work counts at once, its word once enough of its work was accepted."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from psyche.protocol.messages import Standing
from psyche.protocol.proposals import draw_seats
from psyche.protocol.round_state import State
from psyche.protocol.standing import probation_note, standing_after, voting
from psyche.protocol.wire import MAX_MEMBERS
from tests.protocol.one_leader import RULES, Table, nodes, rejected, root_after

FOUNDERS, NEW = nodes(8)[:3], nodes(8)[3:]
A, B, C = FOUNDERS
RUN = replace(RULES, rounds=30, start_members=3, min_members=1, probation=3)


def after(before: tuple[Standing, ...], round_number: int, *accepted: str, electorate: tuple[str, ...] = ()):
    return standing_after(
        before, round_number=round_number, electorate=electorate, accepted=accepted, audited=(), rules=RUN
    )


def test_who_begins_a_run_is_past_its_probation_at_once() -> None:
    assert after((), 1, A, B, electorate=(A, B)) == (Standing(A, 3, 1, 0), Standing(B, 3, 1, 0))


def test_a_newcomer_is_after_as_many_accepted_contributions_and_no_further() -> None:
    standing = after((), 1, A, electorate=(A,))
    for round_number, rounds in zip(range(2, 7), (1, 2, 3, 3, 3), strict=True):
        standing = after(standing, round_number, A, B, electorate=(A,))
        assert standing[1] == Standing(B, rounds, round_number, 0)
        votes = voting([A, B], standing=standing, electorate=(A,), probation=3)
        assert (B in votes) == (rounds == 3)


def test_who_stays_away_loses_nothing() -> None:
    standing = after((), 1, A, B, electorate=(A, B))
    assert after(standing, 50, B)[0] == Standing(A, 3, 1, 0)
    assert voting([A], standing=after(standing, 50, B), electorate=(B,), probation=3) == [A]


def test_without_probation_nothing_is_counted_and_everybody_votes() -> None:
    assert standing_after((), round_number=1, electorate=(), accepted=[A], audited=(), rules=RULES) == ()
    assert voting([B, A], standing=(), electorate=(), probation=0) == [A, B]


@given(st.lists(st.sets(st.sampled_from(nodes(12)), min_size=1), max_size=20))
def test_what_is_remembered_is_bounded_and_in_order(rounds: list[set[str]]) -> None:
    standing: tuple[Standing, ...] = ()
    for round_number, accepted in enumerate(rounds, 1):
        standing = standing_after(
            standing, round_number=round_number, electorate=(), accepted=accepted, audited=(), rules=RUN
        )
        assert [one.node for one in standing] == sorted({one.node for one in standing})
        assert all(1 <= one.rounds <= 3 and one.last <= round_number for one in standing)
        assert len(standing) <= MAX_MEMBERS


def test_the_longest_absent_are_forgotten_first() -> None:
    many = nodes(MAX_MEMBERS + 2)
    standing = standing_after((), round_number=1, electorate=(), accepted=many[:2], audited=(), rules=RUN)
    standing = standing_after(standing, round_number=2, electorate=(), accepted=many[1:], audited=(), rules=RUN)
    assert len(standing) == MAX_MEMBERS
    assert many[0] not in {one.node for one in standing}
    assert all(one.last == 2 for one in standing)


# ------------------------------------------------------------------------------------------- in a run


def begun() -> Table:
    """Three founders have done two rounds; five newcomers are there since the second."""
    table = Table(RUN)
    table.arrive(FOUNDERS)
    table.play_round(FOUNDERS)
    table.arrive(NEW)
    table.close(FOUNDERS)
    table.exchange(FOUNDERS)
    table.certify(FOUNDERS)
    table.settle([*NEW, *FOUNDERS])
    return table


def wait_for_another_proposal(table: Table, alive: list[str] | None = None) -> None:
    before = table.state.round.proposal
    while table.state.round.proposal in (None, before):
        table.wait(1.0, alive)


def test_any_number_of_newcomers_changes_nothing_about_who_votes() -> None:
    table = begun()
    voters = []
    for _ in range(4):
        assert {member.node for member in table.plan.members if member.votes} == set(table.state.electorate)
        record = table.play_round([*FOUNDERS, *NEW])
        assert {one.node for one in record.accepted} == {*FOUNDERS, *NEW}, "their work counts"
        voters.append(len(record.voters))
    assert voters == [3, 3, 8, 8]


def test_newcomers_do_not_say_what_the_state_is() -> None:
    table = begun()
    table.close([*FOUNDERS, *NEW])
    table.exchange([*FOUNDERS, *NEW])
    table.certify(FOUNDERS)
    for node in NEW:
        table.attest(node, b"x" * 32)
    table.attest(A)
    assert table.state.rounds == 2
    table.attest(B)
    table.attest(C)
    assert table.state.rounds == 3
    assert table.state.state_root == root_after(table.certified[3])


def test_newcomers_do_not_say_what_can_be_had() -> None:
    """However many claim that a founder's payload never came."""
    table = begun()
    table.close([*FOUNDERS, *NEW])
    for node in [*FOUNDERS, *NEW]:
        table.open(node)
    for node in FOUNDERS:
        table.hold(node, [*FOUNDERS, *NEW])
    for node in NEW:
        table.hold(node, NEW)
    wait_for_another_proposal(table)
    assert {one.node for one in table.proposal.accepted} == {*FOUNDERS, *NEW}


def test_newcomers_are_no_electorate_while_a_founder_is_there() -> None:
    table = begun()
    table.wait(RUN.silence + 1, alive=[A, *NEW])
    table.close([A, *NEW])
    table.exchange([A, *NEW])
    table.certify([A, *NEW])
    wait_for_another_proposal(table, [A, *NEW])
    assert table.proposal.reconfiguration
    assert table.proposal.electorate == (A,)
    table.vote(A)
    assert table.certified[3].voters == (A,)


def test_where_no_founder_is_left_the_run_goes_on_with_who_is_there() -> None:
    table = begun()
    table.wait(RUN.round_bounds[1] + RUN.silence, alive=NEW)
    record = table.play_round(NEW)
    assert record.reconfiguration
    assert set(record.electorate) == set(NEW) == set(record.voters)


def test_a_voter_that_was_not_ready_when_the_round_was_planned_votes_in_it() -> None:
    table = Table(replace(RUN, start_members=4))
    late = NEW[0]
    table.arrive([*FOUNDERS, late])
    table.close([*FOUNDERS, late])
    table.exchange([*FOUNDERS, late])
    table.certify([*FOUNDERS, late])
    table.settle(FOUNDERS)  # the next round is planned before the fourth has taken its outer step
    table.wait(RUN.exchange_bounds[1])
    assert late in table.state.electorate
    assert table.plan.member(late) is None
    table.arrive([late])
    table.close(FOUNDERS)
    table.exchange(FOUNDERS)
    table.certify([A, B, late])
    assert table.certified[2].electorate == tuple(sorted([*FOUNDERS, late]))


def test_who_is_not_of_the_electorate_and_only_follows_has_no_vote() -> None:
    table = Table(RUN)
    table.arrive(FOUNDERS)
    table.arrive(NEW)
    table.close(FOUNDERS)
    table.exchange(FOUNDERS)
    assert "not-a-member: not in the electorate" in rejected(table.vote(NEW[0]))


def test_a_newcomer_is_told_how_far_it_is() -> None:
    table = begun()
    notes = [probation_note(table.play_round([*FOUNDERS, *NEW]), NEW[0], 3) for _ in range(4)]
    assert notes == [
        "on probation: 1 of 3 contributions accepted; then this node has a vote",
        "on probation: 2 of 3 contributions accepted; then this node has a vote",
        "past its probation: this node has a vote from the next round on",
        None,
    ]
    assert probation_note(table.certified[6], A, 3) is None


def test_a_crowd_of_newcomers_takes_no_voters_seat() -> None:
    many = nodes(MAX_MEMBERS + 60)
    voters = many[::140]
    state = replace(State.initial(RUN), electorate=tuple(voters))
    seats = draw_seats(RUN, state, many)
    assert len(seats) == MAX_MEMBERS
    assert set(voters) <= set(seats)
    assert seats == sorted(seats)
