"""A restarted coordinator recovers the run's state from its members."""

from __future__ import annotations

from psyche.protocol.round_state import (
    Arrived,
    Finished,
    Restored,
)
from tests.protocol.one_leader import (
    Leader,
    kinds,
    peer_id,
    started,
)


def after_rounds(rounds: int) -> tuple[Leader, list[str]]:
    leader, members = started(rounds=9)
    for _ in range(rounds):
        leader.run_round(members)
    return leader, members


def test_a_restarted_coordinator_waits_for_two_thirds_of_the_electorate() -> None:
    old, members = after_rounds(2)
    record, root = old.certified[2], old.state.state_root
    new = Leader(old.rules)
    new.send(Restored(record))
    assert new.state.rounds == 2
    assert new.state.state_root == b""
    stranger = peer_id(77)
    new.arrive([*members[:2], stranger], root)
    assert new.state.round is None, "two of four, and a node outside the electorate"
    assert members[3][-6:] in new.state.note
    (planned,) = new.arrive([members[2]], root)
    assert planned.plan.round == 3
    assert planned.plan.previous == record.hash
    assert planned.plan.base_root == root
    assert planned.plan.seed == old.plan.seed
    assert planned.plan.position == old.plan.position
    new.certified = dict(old.certified)
    new.run_round([m.node for m in planned.plan.members])
    assert new.state.rounds == 3


def test_after_a_restart_a_member_with_another_state_does_not_decide() -> None:
    old, members = after_rounds(1)
    new = Leader(old.rules)
    new.send(Restored(old.certified[1]))
    new.arrive(members[:1], b"w" * 32)
    new.arrive(members[1:3], old.state.state_root)
    assert new.state.round is None
    (planned,) = new.arrive(members[3:], old.state.state_root)
    assert [m.node for m in planned.plan.members] == members[1:]


def test_after_a_restart_members_that_are_behind_do_not_decide() -> None:
    """Three of four agree, but on the state of a round before the last certified one."""
    leader, members = started(rounds=9)
    leader.run_round(members)
    older = leader.state.state_root
    leader.run_round(members)
    new = Leader(leader.rules)
    new.send(Restored(leader.certified[2]))
    new.arrive(members[:1], leader.state.state_root)
    for node in members[1:]:
        new.send(Arrived(node, older, "cpu", 1))
    assert (new.state.state_root, new.state.round) == (b"", None)
    assert "who are behind" in new.state.note
    for node in members[1:3]:  # they receive the certificate, apply the record and report the new state
        new.send(Arrived(node, leader.state.state_root, "cpu", 2))
    assert new.plan.base_root == leader.state.state_root


def test_the_longest_history_wins_a_restart() -> None:
    old, members = after_rounds(3)
    new = Leader(old.rules)
    for number in (1, 3, 2):
        new.send(Restored(old.certified[number]))
    assert new.state.rounds == 3
    new.arrive(members, old.state.state_root)
    assert new.plan.round == 4


def test_terms_continue_after_a_restart() -> None:
    old, members = after_rounds(2)
    new = Leader(old.rules)
    new.send(Restored(old.certified[2]))
    new.arrive(members, old.state.state_root)
    assert new.plan.term > old.certified[2].plan.term


def test_a_restart_after_the_last_round_finishes() -> None:
    old, members = started(rounds=1)
    old.run_round(members)
    new = Leader(old.rules)
    assert kinds(new.send(Restored(old.certified[1]))) == [Finished]


def test_an_older_record_does_not_roll_the_run_back() -> None:
    leader, _ = after_rounds(3)
    leader.send(Restored(leader.certified[1]))
    assert leader.state.rounds == 3
    assert leader.plan.round == 4
