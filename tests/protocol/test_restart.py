"""A coordinator that starts again: what it believes of the rounds before."""

from __future__ import annotations

from psyche.protocol.round_state import (
    Arrived,
    Finished,
    Restored,
)
from tests.protocol.one_leader import (
    Table,
    kinds,
    peer_id,
    started,
)


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


def test_after_a_restart_those_who_are_behind_do_not_decide() -> None:
    """They are three of four and agree; but on the state of a round before the last one certified."""
    table, members = started(rounds=9)
    table.play_round(members)
    older = table.state.state_root
    table.play_round(members)
    new = Table(table.rules)
    new.send(Restored(table.certified[2]))
    new.arrive(members[:1], table.state.state_root)
    for node in members[1:]:
        new.send(Arrived(node, older, "cpu", 1))
    assert (new.state.state_root, new.state.round) == (b"", None)
    assert "who are behind" in new.state.note
    for node in members[1:3]:  # they apply the record, whose certificate they are shown, and say so
        new.send(Arrived(node, table.state.state_root, "cpu", 2))
    assert new.plan.base_root == table.state.state_root


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
