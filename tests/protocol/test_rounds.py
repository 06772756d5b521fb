"""The rounds of a run, rule by rule: who is waited for, for how long, and what ends in the record."""

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
    Table,
    kinds,
    nodes,
    peer_id,
    rejected,
    root_after,
    started,
)

# ----------------------------------------------------------------------------------- the good case


def test_a_run_from_the_first_member_to_the_last_round() -> None:
    table, members = Table(), nodes(4)
    assert table.arrive(members[:3], GENESIS) == []
    assert table.state.phase is Phase.WAITING
    assert "3 of 4" in table.state.note
    (planned,) = table.arrive(members[3:], GENESIS)
    assert isinstance(planned, Planned)
    assert planned.plan.round == 1
    assert planned.plan.previous == RUN_ID
    assert planned.plan.base_root == GENESIS
    assert planned.plan.position == 0
    previous = planned.plan
    for number in (1, 2, 3):
        assert table.plan.seed == round_seed(table.plan.previous)
        record = table.play_round(members)
        assert [one.node for one in record.accepted] == members
        assert record.excluded == ()
        assert record.electorate == tuple(members)
        assert record.reconfiguration == (record.plan.round == 1), "somebody has to name the first electorate"
        if number < 3:
            assert table.plan.previous == record.hash
            assert table.plan.base_root == root_after(record)
            assert table.plan.position == next_position(previous, RULES.batch_size, 0)
            previous = table.plan
    assert table.state.phase is Phase.FINISHED
    assert kinds(table.effects) == [Planned, Proposed, Certified, StateAgreed] * 3 + [Finished]
    assert table.wait(500, alive=[]) == [Departed(node, "not heard from for 15 s") for node in members]
    assert table.state.phase is Phase.FINISHED


def test_phases_in_their_order() -> None:
    table, members = started()
    seen = [table.state.phase]

    def note() -> None:
        if seen[-1] is not table.state.phase:
            seen.append(table.state.phase)

    for stage in (table.close, table.exchange, table.certify, table.settle):
        for node in members:
            if stage == table.exchange:
                stage(members)
            elif table.state.round is not None and table.plan.round == 1:
                stage([node])
            note()
    assert seen == [Phase.TRAINING, Phase.COMMITTING, Phase.CERTIFYING, Phase.TRAINING]


@pytest.mark.parametrize(("yes", "total", "carried"), [(2, 3, False), (3, 3, True), (3, 4, True), (66, 99, False)])
def test_a_quorum_is_more_than_two_thirds(yes: int, total: int, carried: bool) -> None:
    assert quorum(yes, total) is carried
    assert not quorum(0, 0)


@pytest.mark.parametrize("count", range(1, 11))
def test_a_round_is_certified_by_the_first_quorum_and_not_before(count: int) -> None:
    table, members = started(count)
    table.close(members)
    table.exchange(members)
    for number, node in enumerate(members, start=1):
        if table.state.round is None or table.state.round.certified:
            break
        effects = table.vote(node)
        assert (Certified in kinds(effects)) == (3 * number > 2 * count)
    assert 1 in table.certified


# ----------------------------------------------------------------------------- silent, late, absent


def test_a_silent_member_is_left_out_with_a_reason() -> None:
    table, members = started()
    table.close(members[:3])
    table.wait(30, alive=members[:3])
    assert table.state.phase is Phase.CERTIFYING
    table.exchange(members[:3])
    excluded = table.proposal.excluded
    assert [one.node for one in excluded] == [members[3]]
    assert excluded[0].reason == ExclusionReason.LOST_CONTACT
    table.certify(members[:3])
    assert 1 in table.certified
    table.settle(members[:3])
    assert [m.node for m in table.plan.members] == members[:3]


def test_a_member_that_is_here_but_slow_is_waited_for_until_the_deadline() -> None:
    table, members = started()
    table.close(members[:3])
    table.wait(RULES.round_bounds[1] - 1, alive=members)
    assert table.state.phase is Phase.COMMITTING
    table.wait(1, alive=members)
    assert table.state.phase is Phase.CERTIFYING
    assert "too-late:" in rejected(table.commit(members[3]))
    table.exchange(members[:3])
    table.hold(members[3], members[:3])
    assert table.proposal.excluded[0].reason == ExclusionReason.NO_COMMITMENT


def test_a_commitment_that_is_never_opened() -> None:
    table, members = started()
    table.close(members)
    for node in members[:3]:
        table.open(node)
    for node in members:
        table.hold(node, members[:3])
    assert table.state.round.proposal is None
    table.wait(51)
    (one,) = table.proposal.excluded
    assert (one.node, one.reason) == (members[3], ExclusionReason.NOT_REVEALED)


def test_a_payload_that_reaches_too_few() -> None:
    table, members = started()
    table.close(members)
    for node in members:
        table.open(node)
    for node in members[:3]:
        table.hold(node, members[:3])
    table.hold(members[3], members)
    table.wait(51)
    (one,) = table.proposal.excluded
    assert (one.node, one.reason) == (members[3], ExclusionReason.NOT_HELD)


def test_a_round_in_which_nobody_commits_starts_again() -> None:
    table, members = started()
    effects = table.wait(101)
    assert kinds(effects) == [Abandoned, Planned]
    assert effects[0].round == effects[1].plan.round == 1
    assert effects[1].plan.term > 1
    table.play_round(members)
    assert 1 in table.certified


def test_when_all_members_go_the_run_waits_and_says_so() -> None:
    table, members = started()
    for node in members:
        table.send(Left(node, "bye"))
    assert table.state.phase is Phase.WAITING
    assert "0 of 4" in table.state.note
    table.arrive(members, GENESIS)
    table.play_round(members)
    for node in members[1:]:
        table.send(Left(node, "bye"))
    for node in members[:1]:
        table.commit(node)
        table.open(node)
        table.hold(node, [node])
    assert table.state.round is not None


def test_between_rounds_too_few_members_pause_the_run() -> None:
    members = nodes(4)
    table = Table(replace(RULES, min_members=3))
    table.arrive(members, GENESIS)
    table.close(members)
    table.exchange(members)
    table.certify(members)
    root = root_after(table.proposal)
    for node in members[2:]:
        table.send(Left(node, "bye"))
    for node in members:
        table.send(Attested(node, 1, root))
    assert table.state.phase is Phase.PAUSED
    assert "2 of 3" in table.state.note
    assert kinds(table.send(Arrived(members[3], root, "cpu", table.state.rounds))) == [Planned]


def test_a_newcomer_waits_for_the_next_round() -> None:
    table, members = started()
    newcomer = peer_id(99)
    assert "not-a-member:" in rejected(table.send(Attested(newcomer, 1, b"s" * 32)))
    table.arrive([newcomer], GENESIS)
    assert "not-a-member:" in rejected(table.send(Committed(newcomer, 1, table.plan.term, b"d" * 32, b"")))
    table.wait(5)
    table.close(members)
    table.exchange(members)
    assert "not-a-member:" in rejected(table.hold(newcomer, members))
    table.certify(members)
    right = root_after(table.proposal)
    table.settle(members)
    assert table.plan.round == 1, "it holds the base state and may be following: it is given a grace period"
    table.attest(newcomer, right)
    assert [m.node for m in table.plan.members] == sorted([*members, newcomer])
    assert table.plan.round == 2


def test_a_newcomer_that_does_not_follow_is_not_waited_for_beyond_the_deadline() -> None:
    table, members = started()
    table.arrive([peer_id(99)], GENESIS)
    table.close(members)
    table.exchange(members)
    table.certify(members)
    table.settle(members)
    table.wait(51)
    assert table.plan.round == 2
    assert [m.node for m in table.plan.members] == members


def test_newcomers_have_no_say_in_what_the_state_is() -> None:
    table, members = started()
    crowd = [peer_id(n) for n in range(90, 100)]
    table.arrive(crowd, GENESIS)
    table.close(members)
    table.exchange(members)
    table.certify(members)
    right = root_after(table.proposal)
    for node in crowd:
        table.attest(node, b"w" * 32)
    table.settle(members)
    assert table.state.state_root == right
    assert [m.node for m in table.plan.members] == members


def test_a_member_back_with_another_state_is_not_waited_for() -> None:
    table, members = started()
    table.close(members[:3])
    assert table.state.round.stage is Stage.COMMITTING
    table.send(Arrived(members[3], b"o" * 32, "cpu", table.state.rounds))
    assert table.state.round.stage is not Stage.COMMITTING


def test_a_member_back_with_the_same_state_is_waited_for() -> None:
    table, members = started()
    table.close(members[:3])
    table.send(Arrived(members[3], GENESIS, "cpu", table.state.rounds))
    assert table.state.round.stage is Stage.COMMITTING
    table.commit(members[3])
    assert table.state.round.stage is not Stage.COMMITTING


# ------------------------------------------------------------------------------------ attestations


def test_a_divergent_member_is_named_and_left_out_until_it_holds_the_state() -> None:
    table, members = started()
    table.close(members)
    table.exchange(members)
    table.certify(members)
    right = root_after(table.proposal)
    for node in members[:3]:
        table.attest(node, right)
    (settled, diverged, planned) = table.attest(members[3], b"w" * 32)
    assert settled == StateAgreed(1, right)
    assert diverged == Diverged(members[3], 1, right, b"w" * 32)
    assert [m.node for m in planned.plan.members] == members[:3]
    table.send(Seen(members[3]))
    table.play_round(members[:3])
    assert [m.node for m in table.plan.members] == members[:3]


def test_a_divergent_member_is_planned_again_once_it_is_mended() -> None:
    table, members = started(rounds=9)
    table.close(members)
    table.exchange(members)
    table.certify(members)
    right = root_after(table.proposal)
    for node in members[:3]:
        table.attest(node, right)
    table.attest(members[3], b"w" * 32)
    table.send(Arrived(members[3], right, "cpu", table.state.rounds))
    table.close(members[:3])
    table.exchange(members[:3])
    table.certify(members[:3])
    root = root_after(table.proposal)
    for node in members:
        table.attest(node, root)
    assert [m.node for m in table.plan.members] == members


def test_an_attestation_that_never_comes_costs_one_deadline() -> None:
    table, members = started()
    table.close(members)
    table.exchange(members)
    table.certify(members)
    right = root_after(table.proposal)
    for node in members[:3]:
        table.attest(node, right)
    assert table.plan.round == 1
    table.wait(51)
    assert table.plan.round == 2
    assert [m.node for m in table.plan.members] == members[:3]


# -------------------------------------------------------------------------------- reconfigurations


def test_survivors_of_a_round_can_close_it() -> None:
    table, members = started(6)
    table.close(members)
    table.exchange(members)
    first = table.proposal
    table.vote(members[0])
    table.wait(22, alive=members[:3])
    record = table.proposal
    assert record.reconfiguration > first.reconfiguration
    assert set(record.electorate) <= set(members[:3])
    assert record.plan == first.plan
    for node in record.electorate:
        table.vote(node)
        if 1 in table.certified:
            break
    assert table.certified[1] == record


def test_a_roster_that_cannot_be_signed_gives_way_to_those_it_was_to_replace() -> None:
    table, members = started(6)
    table.close(members)
    table.exchange(members)
    first = table.proposal
    table.vote(members[0])
    table.wait(22, alive=members[:3])
    unsigned, before = table.proposal, table.state.replaced
    assert len(unsigned.electorate) < len(first.electorate)
    table.send(CosignersUnreachable(first.hash))
    assert table.proposal == unsigned, "that is not the one in question"
    table.send(CosignersUnreachable(unsigned.hash))
    assert (table.proposal.electorate, table.proposal.reconfiguration) == before
    assert table.proposal.accepted == unsigned.accepted


def test_what_has_its_votes_gives_way_to_nothing_but_another_seal() -> None:
    """A certificate waits for coordinators, too. Until they answer there is nothing else that could be certified."""
    table, members = started(6)
    table.close(members)
    table.exchange(members)
    table.vote(members[0])
    table.wait(22, alive=members[:3])
    for node in table.proposal.electorate:
        if 1 not in table.certified:
            table.vote(node)
    record = table.certified[1]
    assert table.state.replaced is not None
    assert table.send(CosignersUnreachable(record.hash)) == []
    assert table.proposal == record


def test_a_member_that_returns_can_vote_again() -> None:
    table, members = started(4)
    table.close(members)
    table.exchange(members)
    for node in members[2:]:
        table.send(Left(node, "bye"))
    table.vote(members[0])
    table.wait(7, alive=members[:2])
    table.arrive(members[2:], GENESIS)
    for _ in range(4):
        for node in members:
            if 1 not in table.certified and node in table.proposal.electorate:
                table.vote(node)
        table.wait(51)
    assert 1 in table.certified
