"""The rules of rounds: how long members are waited for, who is excluded, and what the record contains."""

from __future__ import annotations

from dataclasses import replace

import pytest

from psyche.protocol.assignment import next_position
from psyche.protocol.messages import ExclusionReason
from psyche.protocol.proposals import round_seed
from psyche.protocol.round_state import (
    Abandoned,
    Arrived,
    Attested,
    Certified,
    Committed,
    CosignersUnreachable,
    Departed,
    Diverged,
    Finished,
    Left,
    Phase,
    Planned,
    Proposed,
    Seen,
    Stage,
    StateAgreed,
)
from psyche.protocol.standing import quorum
from tests.protocol.one_leader import (
    GENESIS,
    RULES,
    RUN_ID,
    Leader,
    kinds,
    nodes,
    peer_id,
    rejected,
    root_after,
    started,
)

# ----------------------------------------------------------------------------------- the good case


def test_a_run_goes_from_the_first_member_to_the_last_round() -> None:
    leader, members = Leader(), nodes(4)
    assert leader.arrive(members[:3], GENESIS) == []
    assert leader.state.phase is Phase.WAITING
    assert "3 of 4" in leader.state.note
    (planned,) = leader.arrive(members[3:], GENESIS)
    assert isinstance(planned, Planned)
    assert planned.plan.round == 1
    assert planned.plan.previous == RUN_ID
    assert planned.plan.base_root == GENESIS
    assert planned.plan.position == 0
    previous = planned.plan
    for number in (1, 2, 3):
        assert leader.plan.seed == round_seed(leader.plan.previous)
        record = leader.run_round(members)
        assert [one.node for one in record.accepted] == members
        assert record.excluded == ()
        assert record.electorate == tuple(members)
        assert record.reconfiguration == (record.plan.round == 1), (
            "only the first record names its electorate by a reconfiguration"
        )
        if number < 3:
            assert leader.plan.previous == record.hash
            assert leader.plan.base_root == root_after(record)
            assert leader.plan.position == next_position(previous, RULES.batch_size, 0)
            previous = leader.plan
    assert leader.state.phase is Phase.FINISHED
    assert kinds(leader.effects) == [Planned, Proposed, Certified, StateAgreed] * 3 + [Finished]
    assert leader.wait(500, alive=[]) == [Departed(node, "not heard from for 15 s") for node in members]
    assert leader.state.phase is Phase.FINISHED


def test_phases_follow_each_other_in_order() -> None:
    leader, members = started()
    seen = [leader.state.phase]

    def note() -> None:
        if seen[-1] is not leader.state.phase:
            seen.append(leader.state.phase)

    for stage in (leader.commit_all, leader.exchange, leader.certify, leader.attest_all):
        for node in members:
            if stage == leader.exchange:
                stage(members)
            elif leader.state.round is not None and leader.plan.round == 1:
                stage([node])
            note()
    assert seen == [Phase.TRAINING, Phase.COMMITTING, Phase.CERTIFYING, Phase.TRAINING]


@pytest.mark.parametrize(("yes", "total", "carried"), [(2, 3, False), (3, 3, True), (3, 4, True), (66, 99, False)])
def test_a_quorum_is_more_than_two_thirds(yes: int, total: int, carried: bool) -> None:
    assert quorum(yes, total) is carried
    assert not quorum(0, 0)


@pytest.mark.parametrize("count", range(1, 11))
def test_a_round_is_certified_by_the_first_quorum_and_not_before(count: int) -> None:
    leader, members = started(count)
    leader.commit_all(members)
    leader.exchange(members)
    for number, node in enumerate(members, start=1):
        if leader.state.round is None or leader.state.round.certified:
            break
        effects = leader.vote(node)
        assert (Certified in kinds(effects)) == (3 * number > 2 * count)
    assert 1 in leader.certified


# ----------------------------------------------------------------------------- silent, late, absent


def test_a_silent_member_is_excluded_with_a_reason() -> None:
    leader, members = started()
    leader.commit_all(members[:3])
    leader.wait(30, alive=members[:3])
    assert leader.state.phase is Phase.CERTIFYING
    leader.exchange(members[:3])
    excluded = leader.proposal.excluded
    assert [one.node for one in excluded] == [members[3]]
    assert excluded[0].reason == ExclusionReason.LOST_CONTACT
    leader.certify(members[:3])
    assert 1 in leader.certified
    leader.attest_all(members[:3])
    assert [m.node for m in leader.plan.members] == members[:3]


def test_a_slow_member_that_sends_heartbeats_is_waited_for_until_the_deadline() -> None:
    leader, members = started()
    leader.commit_all(members[:3])
    leader.wait(RULES.round_bounds[1] - 1, alive=members)
    assert leader.state.phase is Phase.COMMITTING
    leader.wait(1, alive=members)
    assert leader.state.phase is Phase.CERTIFYING
    assert "too-late:" in rejected(leader.commit(members[3]))
    leader.exchange(members[:3])
    leader.hold(members[3], members[:3])
    assert leader.proposal.excluded[0].reason == ExclusionReason.NO_COMMITMENT


def test_a_member_that_does_not_reveal_is_excluded() -> None:
    leader, members = started()
    leader.commit_all(members)
    for node in members[:3]:
        leader.reveal(node)
    for node in members:
        leader.hold(node, members[:3])
    assert leader.state.round.proposal is None
    leader.wait(51)
    (one,) = leader.proposal.excluded
    assert (one.node, one.reason) == (members[3], ExclusionReason.NOT_REVEALED)


def test_a_member_whose_payload_too_few_can_fetch_is_excluded() -> None:
    leader, members = started()
    leader.commit_all(members)
    for node in members:
        leader.reveal(node)
    for node in members[:3]:
        leader.hold(node, members[:3])
    leader.hold(members[3], members)
    leader.wait(51)
    (one,) = leader.proposal.excluded
    assert (one.node, one.reason) == (members[3], ExclusionReason.NOT_HELD)


def test_a_round_without_commitments_restarts() -> None:
    leader, members = started()
    effects = leader.wait(101)
    assert kinds(effects) == [Abandoned, Planned]
    assert effects[0].round == effects[1].plan.round == 1
    assert effects[1].plan.term > 1
    leader.run_round(members)
    assert 1 in leader.certified


def test_a_run_that_all_members_left_waits_and_reports_it() -> None:
    leader, members = started()
    for node in members:
        leader.send(Left(node, "bye"))
    assert leader.state.phase is Phase.WAITING
    assert "0 of 4" in leader.state.note
    leader.arrive(members, GENESIS)
    leader.run_round(members)
    for node in members[1:]:
        leader.send(Left(node, "bye"))
    for node in members[:1]:
        leader.commit(node)
        leader.reveal(node)
        leader.hold(node, [node])
    assert leader.state.round is not None


def test_too_few_members_between_rounds_pause_the_run() -> None:
    members = nodes(4)
    leader = Leader(replace(RULES, min_members=3))
    leader.arrive(members, GENESIS)
    leader.commit_all(members)
    leader.exchange(members)
    leader.certify(members)
    root = root_after(leader.proposal)
    for node in members[2:]:
        leader.send(Left(node, "bye"))
    for node in members:
        leader.send(Attested(node, 1, root))
    assert leader.state.phase is Phase.PAUSED
    assert "2 of 3" in leader.state.note
    assert kinds(leader.send(Arrived(members[3], root, "cpu", leader.state.rounds))) == [Planned]


def test_a_new_node_waits_for_the_next_round() -> None:
    leader, members = started()
    newcomer = peer_id(99)
    assert "not-a-member:" in rejected(leader.send(Attested(newcomer, 1, b"s" * 32)))
    leader.arrive([newcomer], GENESIS)
    assert "not-a-member:" in rejected(leader.send(Committed(newcomer, 1, leader.plan.term, b"d" * 32, b"")))
    leader.wait(5)
    leader.commit_all(members)
    leader.exchange(members)
    assert "not-a-member:" in rejected(leader.hold(newcomer, members))
    leader.certify(members)
    right = root_after(leader.proposal)
    leader.attest_all(members)
    assert leader.plan.round == 1, "the new node has the base state and may be catching up: it gets a grace period"
    leader.attest(newcomer, right)
    assert [m.node for m in leader.plan.members] == sorted([*members, newcomer])
    assert leader.plan.round == 2


def test_a_new_node_that_falls_behind_is_not_waited_for_beyond_the_deadline() -> None:
    leader, members = started()
    leader.arrive([peer_id(99)], GENESIS)
    leader.commit_all(members)
    leader.exchange(members)
    leader.certify(members)
    leader.attest_all(members)
    leader.wait(51)
    assert leader.plan.round == 2
    assert [m.node for m in leader.plan.members] == members


def test_attestations_of_new_nodes_do_not_decide_the_state() -> None:
    leader, members = started()
    crowd = [peer_id(n) for n in range(90, 100)]
    leader.arrive(crowd, GENESIS)
    leader.commit_all(members)
    leader.exchange(members)
    leader.certify(members)
    right = root_after(leader.proposal)
    for node in crowd:
        leader.attest(node, b"w" * 32)
    leader.attest_all(members)
    assert leader.state.state_root == right
    assert [m.node for m in leader.plan.members] == members


def test_a_member_back_with_another_state_is_not_waited_for() -> None:
    leader, members = started()
    leader.commit_all(members[:3])
    assert leader.state.round.stage is Stage.COMMITTING
    leader.send(Arrived(members[3], b"o" * 32, "cpu", leader.state.rounds))
    assert leader.state.round.stage is not Stage.COMMITTING


def test_a_member_back_with_the_same_state_is_waited_for() -> None:
    leader, members = started()
    leader.commit_all(members[:3])
    leader.send(Arrived(members[3], GENESIS, "cpu", leader.state.rounds))
    assert leader.state.round.stage is Stage.COMMITTING
    leader.commit(members[3])
    assert leader.state.round.stage is not Stage.COMMITTING


# ------------------------------------------------------------------------------------ attestations


def test_a_diverged_member_is_reported_and_left_out_until_it_has_the_state() -> None:
    leader, members = started()
    leader.commit_all(members)
    leader.exchange(members)
    leader.certify(members)
    right = root_after(leader.proposal)
    for node in members[:3]:
        leader.attest(node, right)
    (settled, diverged, planned) = leader.attest(members[3], b"w" * 32)
    assert settled == StateAgreed(1, right)
    assert diverged == Diverged(members[3], 1, right, b"w" * 32)
    assert [m.node for m in planned.plan.members] == members[:3]
    leader.send(Seen(members[3]))
    leader.run_round(members[:3])
    assert [m.node for m in leader.plan.members] == members[:3]


def test_a_diverged_member_is_planned_again_once_it_has_the_state() -> None:
    leader, members = started(rounds=9)
    leader.commit_all(members)
    leader.exchange(members)
    leader.certify(members)
    right = root_after(leader.proposal)
    for node in members[:3]:
        leader.attest(node, right)
    leader.attest(members[3], b"w" * 32)
    leader.send(Arrived(members[3], right, "cpu", leader.state.rounds))
    leader.commit_all(members[:3])
    leader.exchange(members[:3])
    leader.certify(members[:3])
    root = root_after(leader.proposal)
    for node in members:
        leader.attest(node, root)
    assert [m.node for m in leader.plan.members] == members


def test_a_missing_attestation_costs_one_deadline() -> None:
    leader, members = started()
    leader.commit_all(members)
    leader.exchange(members)
    leader.certify(members)
    right = root_after(leader.proposal)
    for node in members[:3]:
        leader.attest(node, right)
    assert leader.plan.round == 1
    leader.wait(51)
    assert leader.plan.round == 2
    assert [m.node for m in leader.plan.members] == members[:3]


# -------------------------------------------------------------------------------- reconfigurations


def test_the_survivors_of_a_round_can_certify_it() -> None:
    leader, members = started(6)
    leader.commit_all(members)
    leader.exchange(members)
    first = leader.proposal
    leader.vote(members[0])
    leader.wait(22, alive=members[:3])
    record = leader.proposal
    assert record.reconfiguration > first.reconfiguration
    assert set(record.electorate) <= set(members[:3])
    assert record.plan == first.plan
    for node in record.electorate:
        leader.vote(node)
        if 1 in leader.certified:
            break
    assert leader.certified[1] == record


def test_a_reconfiguration_that_cannot_be_signed_is_replaced_by_the_previous_electorate() -> None:
    leader, members = started(6)
    leader.commit_all(members)
    leader.exchange(members)
    first = leader.proposal
    leader.vote(members[0])
    leader.wait(22, alive=members[:3])
    unsigned, before = leader.proposal, leader.state.replaced
    assert len(unsigned.electorate) < len(first.electorate)
    leader.send(CosignersUnreachable(first.hash))
    assert leader.proposal == unsigned, "the message concerns another record"
    leader.send(CosignersUnreachable(unsigned.hash))
    assert (leader.proposal.electorate, leader.proposal.reconfiguration) == before
    assert leader.proposal.accepted == unsigned.accepted


def test_a_record_with_its_votes_is_replaced_only_if_another_was_sealed() -> None:
    """Its certificate waits for the other coordinators; until they answer, nothing else may be certified."""
    leader, members = started(6)
    leader.commit_all(members)
    leader.exchange(members)
    leader.vote(members[0])
    leader.wait(22, alive=members[:3])
    for node in leader.proposal.electorate:
        if 1 not in leader.certified:
            leader.vote(node)
    record = leader.certified[1]
    assert leader.state.replaced is not None
    assert leader.send(CosignersUnreachable(record.hash)) == []
    assert leader.proposal == record


def test_a_member_that_returns_can_vote_again() -> None:
    leader, members = started(4)
    leader.commit_all(members)
    leader.exchange(members)
    for node in members[2:]:
        leader.send(Left(node, "bye"))
    leader.vote(members[0])
    leader.wait(7, alive=members[:2])
    leader.arrive(members[2:], GENESIS)
    for _ in range(4):
        for node in members:
            if 1 not in leader.certified and node in leader.proposal.electorate:
                leader.vote(node)
        leader.wait(51)
    assert 1 in leader.certified
