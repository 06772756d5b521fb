"""The rounds of a run, rule by rule: who is waited for, for how long, and what ends in the record."""

from __future__ import annotations

from dataclasses import replace

import pytest

from psyche.protocol.assignment import next_position
from psyche.protocol.deadlines import WINDOW, adaptive
from psyche.protocol.proposals import allowed, quorum, round_seed
from psyche.protocol.state import (
    Abandoned,
    Arrived,
    Attested,
    Certified,
    Committed,
    Departed,
    Diverged,
    Finished,
    Held,
    Left,
    Opened,
    Phase,
    Planned,
    Proposed,
    Restored,
    Seen,
    Settled,
    Tick,
    Voted,
)
from tests.protocol.players import (
    GENESIS,
    RULES,
    RUN_ID,
    Table,
    contribution,
    nodes,
    peer_id,
    rejected,
    root_after,
    started,
)


def kinds(effects: list) -> list[type]:
    return [type(effect) for effect in effects]


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
        assert not record.reconfiguration
        if number < 3:
            assert table.plan.previous == record.hash
            assert table.plan.base_root == root_after(record)
            assert table.plan.position == next_position(previous, RULES.batch_size, 0)
            previous = table.plan
    assert table.state.phase is Phase.FINISHED
    assert kinds(table.effects) == [Planned, Proposed, Certified, Settled] * 3 + [Finished]
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
    assert "no commitment" in excluded[0].reason
    assert "not heard from" in excluded[0].reason
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
    reason = rejected(table.commit(members[3]))
    assert "deadline has passed" in reason
    table.exchange(members[:3])
    table.hold(members[3], members[:3])
    assert table.proposal.excluded[0].reason == "no commitment before the deadline"


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
    assert (one.node, one.reason) == (members[3], "the commitment was not opened")


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
    assert (one.node, one.reason) == (members[3], "its payload did not reach enough members")


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
    assert kinds(table.send(Arrived(members[3], root, "cpu"))) == [Planned]


def test_a_newcomer_waits_for_the_next_round() -> None:
    table, members = started()
    newcomer = peer_id(99)
    assert "not a member" in rejected(table.send(Attested(newcomer, 1, b"s" * 32)))
    table.arrive([newcomer], GENESIS)
    assert "not a member" in rejected(table.send(Committed(newcomer, 1, b"d" * 32, b"")))
    table.close(members)
    table.exchange(members)
    assert "not a member" in rejected(table.hold(newcomer, members))
    table.certify(members)
    right = root_after(table.proposal)
    table.settle(members)
    assert table.plan.round == 1, "it holds the base state and may be following: there is time until the deadline"
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
    assert table.state.round.closed is None
    table.send(Arrived(members[3], b"o" * 32, "cpu"))
    assert table.state.round.closed is not None


def test_a_member_back_with_the_same_state_is_waited_for() -> None:
    table, members = started()
    table.close(members[:3])
    table.send(Arrived(members[3], GENESIS, "cpu"))
    assert table.state.round.closed is None
    table.commit(members[3])
    assert table.state.round.closed is not None


# --------------------------------------------------------------------------------------- refusals


def test_what_is_refused_while_commitments_are_taken() -> None:
    table, members = started()
    one, plan = members[0], table.plan
    assert "is not open" in rejected(table.send(Committed(one, 2, b"d" * 32, b"")))
    assert "still takes commitments" in rejected(table.open(one))
    assert "still takes commitments" in rejected(table.hold(one, members))
    assert "still takes commitments" in rejected(table.send(Voted(one, 1, 1, b"r" * 32, b"")))
    assert "still takes commitments" in rejected(table.send(Attested(one, 1, b"r" * 32)))
    table.commit(one)
    assert table.commit(one) == [], "the same commitment again is not an error"
    assert "different commitment" in rejected(table.send(Committed(one, 1, b"d" * 32, b"")))
    assert table.state.round.commitments[one][0] == contribution(one, plan).commitment(one, RUN_ID, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base_root": b"x" * 32}, "another base state"),
        ({"inner_steps": 6, "tokens": 240}, "6 inner steps claimed where 5 were due"),
        ({"tokens": 201}, "tokens claimed"),
        ({"tokens": 2**60}, "tokens claimed"),
        ({"inner_steps": 4}, "tokens claimed"),
        ({"payload_bytes": RULES.payload_bytes + 1}, "larger than the codec"),
    ],
)
def test_nobody_sets_their_own_weight_or_size(changes: dict[str, object], reason: str) -> None:
    table, members = started()
    table.close(members[1:])
    table.commit(members[0], **changes)
    assert reason in rejected(table.open(members[0], **changes))
    assert "not the one committed to" in rejected(table.open(members[0]))


def test_fewer_steps_than_due_count_for_less() -> None:
    table, members = started()
    less = {"inner_steps": 2, "tokens": 2 * RULES.tokens_per_step}
    table.close(members[1:])
    table.commit(members[0], **less)
    table.open(members[0], **less)
    for node in members[1:]:
        table.open(node)
    for node in members:
        table.hold(node, members)
    assert table.proposal.accepted[0].contribution.tokens == 80


def test_an_opening_without_a_commitment_is_refused() -> None:
    table, members = started()
    table.close(members[:3])
    table.wait(101)
    assert "nothing was committed" in rejected(table.open(members[3]))


def test_the_contribution_of_another_is_refused() -> None:
    """The name is in the hash: nobody can commit to, or open, the work of somebody else as their own."""
    table, members = started()
    stolen = contribution(members[1], table.plan).commitment(members[1], RUN_ID, 1)
    table.send(Committed(members[0], 1, stolen, b""))
    table.close(members[1:])
    opened = Opened(members[0], 1, contribution(members[1], table.plan), b"")
    assert "not the one committed to" in rejected(table.send(opened))


def test_votes_that_do_not_count() -> None:
    table, members = started()
    table.close(members)
    table.exchange(members)
    term, record = table.state.round.term, table.proposal.hash
    one = members[0]
    assert "no proposal of term" in rejected(table.send(Voted(one, 1, term - 1, record, b"")))
    assert "no proposal of term" in rejected(table.send(Voted(one, 1, term + 1, record, b"")))
    assert "another record" in rejected(table.send(Voted(one, 1, term, b"x" * 32, b"")))
    stranger = peer_id(99)
    assert "not a member" in rejected(table.send(Voted(stranger, 1, term, record, b"")))
    for _ in range(5):
        table.vote(one)
    assert not table.state.round.certified, "one vote five times is one vote"


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
    assert settled == Settled(1, right)
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
    table.send(Arrived(members[3], right, "cpu"))
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
    table.wait(200, alive=members[:3])
    record = table.proposal
    assert record.reconfiguration
    assert set(record.electorate) <= set(members[:3])
    assert record.plan == first.plan
    for node in record.electorate:
        table.vote(node)
        if 1 in table.certified:
            break
    assert table.certified[1] == record


def test_a_member_that_returns_can_vote_again() -> None:
    table, members = started(4)
    table.close(members)
    table.exchange(members)
    for node in members[2:]:
        table.send(Left(node, "bye"))
    table.vote(members[0])
    table.wait(60, alive=members[:2])
    table.arrive(members[2:], GENESIS)
    for _ in range(4):
        for node in members:
            if 1 not in table.certified and node in table.proposal.electorate:
                table.vote(node)
        table.wait(51)
    assert 1 in table.certified


# ------------------------------------------------------------------------------------- a restart


def played(rounds: int) -> tuple[Table, list[str]]:
    table, members = started(rounds=9)
    for _ in range(rounds):
        table.play_round(members)
    return table, members


def test_a_restarted_coordinator_waits_for_two_thirds_of_the_electorate() -> None:
    old, members = played(2)
    record, root = old.certified[2], old.state.state_root
    new = Table(old.rules)
    new.send(Restored(record))
    assert new.state.rounds == 2
    assert new.state.state_root == b""
    stranger = peer_id(77)
    new.arrive([*members[:2], stranger], root)
    assert new.state.round is None, "two of four, and a stranger"
    assert members[3][-6:] in new.state.note
    (planned,) = new.arrive([members[2]], root)
    assert planned.plan.round == 3
    assert planned.plan.previous == record.hash
    assert planned.plan.base_root == root
    assert planned.plan.seed == old.plan.seed
    assert planned.plan.position == old.plan.position
    new.certified = dict(old.certified)
    new.play_round([m.node for m in planned.plan.members])
    assert new.state.rounds == 3


def test_after_a_restart_one_that_holds_another_state_does_not_decide() -> None:
    old, members = played(1)
    new = Table(old.rules)
    new.send(Restored(old.certified[1]))
    new.arrive(members[:1], b"w" * 32)
    new.arrive(members[1:3], old.state.state_root)
    assert new.state.round is None
    (planned,) = new.arrive(members[3:], old.state.state_root)
    assert [m.node for m in planned.plan.members] == members[1:]


def test_the_longest_history_wins_a_restart() -> None:
    old, members = played(3)
    new = Table(old.rules)
    for number in (1, 3, 2):
        new.send(Restored(old.certified[number]))
    assert new.state.rounds == 3
    new.arrive(members, old.state.state_root)
    assert new.plan.round == 4


def test_terms_go_on_after_a_restart() -> None:
    old, members = played(2)
    new = Table(old.rules)
    new.send(Restored(old.certified[2]))
    new.arrive(members, old.state.state_root)
    assert new.plan.term > old.certified[2].plan.term


def test_a_restart_after_the_last_round_finishes() -> None:
    old, members = started(rounds=1)
    old.play_round(members)
    new = Table(old.rules)
    assert kinds(new.send(Restored(old.certified[1]))) == [Finished]


def test_an_older_record_does_not_turn_the_run_back() -> None:
    table, _ = played(3)
    table.send(Restored(table.certified[1]))
    assert table.state.rounds == 3
    assert table.plan.round == 4


# -------------------------------------------------------------------------------------- deadlines


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        ((), 100.0),
        ((30.0,), 30.0),
        ((1.0,), 10.0),
        ((500.0,), 100.0),
        ((20.0, 30.0, 40.0), 80.0),
        ((20.0,) * 20 + (90.0,), 20.0),
    ],
)
def test_a_deadline_is_median_plus_spread_times_mad(observed: tuple[float, ...], expected: float) -> None:
    assert adaptive(observed, spread=5.0, least=10.0, most=100.0) == expected


def test_exchanges_that_took_the_same_are_no_reason_to_cut_the_next_one_short() -> None:
    assert allowed(replace(RULES, spread=5.0, exchange_bounds=(1.0, 600.0)), (12.0,) * 8) == pytest.approx(18.0)


def test_only_recent_observations_count() -> None:
    assert adaptive((90.0,) * 500 + (20.0,) * WINDOW, spread=5.0, least=10.0, most=100.0) == 20.0


def test_the_commit_deadline_follows_the_members() -> None:
    table, members = started(rounds=99)
    assert table.state.round.deadline - table.state.round.opened == 100.0
    for _ in range(3):
        table.wait(18)
        table.close(members[:2])
        table.wait(4)
        table.close(members[2:])
        table.exchange(members)
        table.certify(members)
        table.settle(members)
    # 18, 18, 22, 22, ...: median 20, MAD 2
    assert table.state.round.deadline - table.state.round.opened == 30.0
    assert len(table.state.commit_seconds) == 12


def test_observations_do_not_grow_without_bound() -> None:
    table, members = started(rounds=40)
    for _ in range(39):
        table.play_round(members)
    assert len(table.state.commit_seconds) <= WINDOW
    assert len(table.state.exchange_seconds) <= WINDOW


def test_silence_is_counted_from_the_last_word() -> None:
    table, members = started()
    table.wait(14, alive=members[1:])
    table.send(Seen(members[0]))
    table.wait(15, alive=members[1:])
    assert members[0] in table.state.peers
    effects = table.wait(1, alive=members[1:])
    assert effects == [Departed(members[0], "not heard from for 15 s")]


def test_a_word_from_somebody_unknown_is_nothing() -> None:
    table, _ = started()
    assert table.send(Seen(peer_id(99))) == []
    assert table.send(Left(peer_id(99), "bye")) == []
    assert peer_id(99) not in table.state.peers
    assert table.send(Tick()) == []
    assert rejected(table.send(Held(peer_id(99), 1, frozenset())))


def test_a_round_nobody_committed_to_forgets_no_exchange() -> None:
    """Else whoever goes away in the next one is waited for as long as the manifest allows at all."""
    table, members = started()
    table.play_round(members)
    seconds = table.state.exchange_seconds
    assert seconds
    assert Abandoned in kinds(table.wait(2 * RULES.round_bounds[1]))
    assert table.state.exchange_seconds == seconds
