"""What the round machine refuses, with the reason its sender hears."""

from __future__ import annotations

import pytest

from psyche.protocol.round_state import (
    Attested,
    Committed,
    Fetched,
    Left,
    Revealed,
    Seen,
    Tick,
    Voted,
)
from tests.protocol.one_leader import (
    RULES,
    RUN_ID,
    contribution,
    peer_id,
    rejected,
    started,
)


def test_what_is_refused_while_commitments_are_taken() -> None:
    table, members = started()
    one, plan = members[0], table.plan
    assert "wrong-round:" in rejected(table.send(Committed(one, 2, table.plan.term, b"d" * 32, b"")))
    assert "too-early:" in rejected(table.open(one))
    assert "too-early:" in rejected(table.hold(one, members))
    assert "too-early:" in rejected(table.send(Voted(one, 1, 1, b"r" * 32, b"")))
    assert "too-early:" in rejected(table.send(Attested(one, 1, b"r" * 32)))
    table.commit(one)
    assert table.commit(one) == [], "the same commitment again is not an error"
    assert "conflict:" in rejected(table.send(Committed(one, 1, table.plan.term, b"d" * 32, b"")))
    assert table.state.round.commitments[one][0] == contribution(one, plan).commitment(one, RUN_ID, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base_root": b"x" * 32}, "another base state"),
        ({"inner_steps": 6, "tokens": 240}, "6 inner steps claimed, 5 due"),
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
    assert "too-late:" in rejected(table.open(members[3]))


def test_the_contribution_of_another_is_refused() -> None:
    """The name is in the hash: nobody can commit to, or open, the work of somebody else as their own."""
    table, members = started()
    stolen = contribution(members[1], table.plan).commitment(members[1], RUN_ID, 1)
    table.send(Committed(members[0], 1, table.plan.term, stolen, b""))
    table.close(members[1:])
    opened = Revealed(members[0], 1, contribution(members[1], table.plan), b"")
    assert "not the one committed to" in rejected(table.send(opened))


def test_votes_that_do_not_count() -> None:
    table, members = started()
    table.close(members)
    table.exchange(members)
    term, record = table.state.round.term, table.proposal.hash
    one = members[0]
    assert "wrong-term:" in rejected(table.send(Voted(one, 1, term - 1, record, b"")))
    assert "wrong-term:" in rejected(table.send(Voted(one, 1, term + 1, record, b"")))
    assert "another record" in rejected(table.send(Voted(one, 1, term, b"x" * 32, b"")))
    stranger = peer_id(99)
    assert "not-a-member:" in rejected(table.send(Voted(stranger, 1, term, record, b"")))
    for _ in range(5):
        table.vote(one)
    assert not table.state.round.certified, "one vote five times is one vote"


def test_a_word_from_somebody_unknown_is_nothing() -> None:
    table, _ = started()
    assert table.send(Seen(peer_id(99))) == []
    assert table.send(Left(peer_id(99), "bye")) == []
    assert peer_id(99) not in table.state.peers
    assert table.send(Tick()) == []
    assert rejected(table.send(Fetched(peer_id(99), 1, frozenset())))


def test_a_round_that_is_begun_again_takes_no_commitment_to_the_first_attempt() -> None:
    """Its author trains again, could not open it, and would be waited for."""
    table, members = started()
    first = table.plan
    table.wait(RULES.round_bounds[1] + 1)
    assert table.plan.round == first.round
    assert table.plan.term > first.term
    stale = contribution(members[0], first).commitment(members[0], RUN_ID, first.round)
    assert "wrong-term:" in rejected(table.send(Committed(members[0], first.round, first.term, stale, b"")))
    table.play_round(members)
    assert len(table.certified[1].accepted) == len(members)
