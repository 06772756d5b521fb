"""How long the others wait for a member that is slow, leaves or dies between the vote and the next round."""

from __future__ import annotations

import pytest

from psyche.protocol.round_state import Left, Phase
from tests.protocol.one_leader import RULES, Leader, root_after, started


def voted_without(seconds: float) -> tuple[Leader, list[str], str]:
    """Run a round of ``seconds`` that all but one member, which lacks a payload, certify and attest."""
    leader, members = started()
    leader.wait(seconds)
    leader.commit_all(members)
    for node in members:
        leader.reveal(node)
    for node in members[:3]:
        leader.hold(node, members)
    leader.wait(RULES.exchange_bounds[1])
    for node in members[:3]:
        leader.vote(node)
    for node in members[:3]:
        leader.attest(node)
    return leader, members[:3], members[3]


@pytest.mark.parametrize("seconds", [20, 40])
def test_a_member_slow_to_fetch_is_waited_for_a_tenth_of_the_training_time(seconds: int) -> None:
    """Not for another exchange deadline: a link with a tenth of the others' bandwidth would double every round."""
    leader, quick, _ = voted_without(seconds)
    certified = leader.now
    while leader.plan.round == 1:
        leader.wait(0.5, step=0.5)
    assert leader.now - certified == pytest.approx(seconds / 10, abs=0.6)
    assert [member.node for member in leader.plan.members] == quick


def test_a_slow_member_that_attests_within_that_time_is_in_the_next_round() -> None:
    leader, quick, slow = voted_without(80)
    leader.wait(4)
    leader.attest(slow)
    assert [member.node for member in leader.plan.members] == [*quick, slow]


@pytest.mark.parametrize("attested", [False, True])
def test_a_member_that_leaves_gracefully_is_not_waited_for(attested: bool) -> None:
    """Its vote will not come: the others continue at once, without the timeout for a return."""
    leader, (stays, leaves) = started(2, rounds=9)
    leader.commit_all([stays, leaves])
    leader.exchange([stays, leaves])
    leader.certify([stays, leaves])
    if attested:
        leader.attest(leaves)
    leader.send(Left(leaves, "it leaves"))
    leader.attest(stays)
    assert [(leader.plan.round, member.node) for member in leader.plan.members] == [(2, stays)]
    record = leader.run_round([stays])
    assert record.electorate == (stays,)


def test_a_member_that_dies_after_voting_does_not_block_agreement_on_the_state() -> None:
    leader, (stays, dies) = started(2, rounds=9)
    leader.commit_all([stays, dies])
    leader.exchange([stays, dies])
    leader.certify([stays, dies])
    leader.attest(stays)
    leader.wait(RULES.silence - 1, alive=[stays])
    assert leader.state.rounds == 0
    leader.wait(2 + RULES.silence, alive=[stays])
    assert leader.state.rounds == 1
    assert [member.node for member in leader.plan.members] == [stays]


@pytest.mark.parametrize("liar", [False, True])
def test_when_half_of_the_voters_are_gone_the_rest_must_be_unanimous(liar: bool) -> None:
    """Of four voters two died: one wrong attestation pauses the run but decides nothing."""
    leader, members = started(4, rounds=9)
    leader.commit_all(members)
    leader.exchange(members)
    leader.certify(members)
    right = root_after(leader.proposal)
    leader.attest(members[0], right)
    leader.attest(members[1], b"w" * 32 if liar else right)
    leader.wait(RULES.exchange_bounds[1] + RULES.silence, alive=members[:2])
    if liar:
        assert leader.state.phase is Phase.PAUSED
        leader.arrive(members[2:])
        for node in members[2:]:
            leader.attest(node, right)
    assert leader.state.state_root == right
    assert leader.state.rounds == 1
