"""Who is slow, leaves or dies between a round's vote and the next round: how long the others wait for it."""

from __future__ import annotations

import pytest

from psyche.protocol.round_state import Left, Phase
from tests.protocol.one_leader import RULES, Table, root_after, started


def voted_without(seconds: float) -> tuple[Table, list[str], str]:
    """A round that trained for ``seconds``, and was certified and attested by all but one, who lacks a payload."""
    table, members = started()
    table.wait(seconds)
    table.close(members)
    for node in members:
        table.open(node)
    for node in members[:3]:
        table.hold(node, members)
    table.wait(RULES.exchange_bounds[1])
    for node in members[:3]:
        table.vote(node)
    for node in members[:3]:
        table.attest(node)
    return table, members[:3], members[3]


@pytest.mark.parametrize("seconds", [20, 40])
def test_who_was_too_slow_to_fetch_is_waited_for_by_what_training_took(seconds: int) -> None:
    """Not by another deadline of the exchange: a line that is a tenth of the others' would double each of theirs."""
    table, quick, _ = voted_without(seconds)
    certified = table.now
    while table.plan.round == 1:
        table.wait(0.5, step=0.5)
    assert table.now - certified == pytest.approx(seconds / 10, abs=0.6)
    assert [member.node for member in table.plan.members] == quick


def test_a_slow_one_that_comes_within_that_is_in_the_next_round() -> None:
    table, quick, slow = voted_without(80)
    table.wait(4)
    table.attest(slow)
    assert [member.node for member in table.plan.members] == [*quick, slow]


@pytest.mark.parametrize("attested", [False, True])
def test_who_says_goodbye_is_not_waited_for(attested: bool) -> None:
    """Its vote is missing for good: the others go on at once, not after the time in which it could have come back."""
    table, (stays, leaves) = started(2, rounds=9)
    table.close([stays, leaves])
    table.exchange([stays, leaves])
    table.certify([stays, leaves])
    if attested:
        table.attest(leaves)
    table.send(Left(leaves, "it leaves"))
    table.attest(stays)
    assert [(table.plan.round, member.node) for member in table.plan.members] == [(2, stays)]
    record = table.play_round([stays])
    assert record.electorate == (stays,)


def test_who_voted_and_died_does_not_keep_the_others_from_settling() -> None:
    table, (stays, dies) = started(2, rounds=9)
    table.close([stays, dies])
    table.exchange([stays, dies])
    table.certify([stays, dies])
    table.attest(stays)
    table.wait(RULES.silence - 1, alive=[stays])
    assert table.state.rounds == 0
    table.wait(2 + RULES.silence, alive=[stays])
    assert table.state.rounds == 1
    assert [member.node for member in table.plan.members] == [stays]


@pytest.mark.parametrize("liar", [False, True])
def test_where_no_half_is_left_those_who_are_here_must_agree(liar: bool) -> None:
    """Four voted, two of them died: of the others one lie holds the run up, and decides nothing."""
    table, members = started(4, rounds=9)
    table.close(members)
    table.exchange(members)
    table.certify(members)
    right = root_after(table.proposal)
    table.attest(members[0], right)
    table.attest(members[1], b"w" * 32 if liar else right)
    table.wait(RULES.exchange_bounds[1] + RULES.silence, alive=members[:2])
    if liar:
        assert table.state.phase is Phase.PAUSED
        table.arrive(members[2:])
        for node in members[2:]:
            table.attest(node, right)
    assert table.state.state_root == right
    assert table.state.rounds == 1
