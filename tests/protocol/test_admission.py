"""Messages that the round state machine rejects, with the reason sent to the sender."""

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


def test_only_commitments_are_accepted_while_the_round_trains() -> None:
    leader, members = started()
    one, plan = members[0], leader.plan
    assert "wrong-round:" in rejected(leader.send(Committed(one, 2, leader.plan.term, b"d" * 32, b"")))
    assert "too-early:" in rejected(leader.reveal(one))
    assert "too-early:" in rejected(leader.hold(one, members))
    assert "too-early:" in rejected(leader.send(Voted(one, 1, 1, b"r" * 32, b"")))
    assert "too-early:" in rejected(leader.send(Attested(one, 1, b"r" * 32)))
    leader.commit(one)
    assert leader.commit(one) == [], "the same commitment again is not an error"
    assert "conflict:" in rejected(leader.send(Committed(one, 1, leader.plan.term, b"d" * 32, b"")))
    assert leader.state.round.commitments[one][0] == contribution(one, plan).commitment(one, RUN_ID, 1)


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
def test_a_contribution_cannot_claim_other_tokens_steps_or_size(changes: dict[str, object], reason: str) -> None:
    leader, members = started()
    leader.commit_all(members[1:])
    leader.commit(members[0], **changes)
    assert reason in rejected(leader.reveal(members[0], **changes))
    assert "not the one committed to" in rejected(leader.reveal(members[0]))


def test_fewer_steps_than_assigned_count_for_less() -> None:
    leader, members = started()
    less = {"inner_steps": 2, "tokens": 2 * RULES.tokens_per_step}
    leader.commit_all(members[1:])
    leader.commit(members[0], **less)
    leader.reveal(members[0], **less)
    for node in members[1:]:
        leader.reveal(node)
    for node in members:
        leader.hold(node, members)
    assert leader.proposal.accepted[0].contribution.tokens == 80


def test_a_reveal_without_a_commitment_is_rejected() -> None:
    leader, members = started()
    leader.commit_all(members[:3])
    leader.wait(101)
    assert "too-late:" in rejected(leader.reveal(members[3]))


def test_a_node_cannot_reveal_the_contribution_of_another() -> None:
    """The commitment hashes the PeerID, so copied work cannot be committed to or revealed."""
    leader, members = started()
    stolen = contribution(members[1], leader.plan).commitment(members[1], RUN_ID, 1)
    leader.send(Committed(members[0], 1, leader.plan.term, stolen, b""))
    leader.commit_all(members[1:])
    revealed = Revealed(members[0], 1, contribution(members[1], leader.plan), b"")
    assert "not the one committed to" in rejected(leader.send(revealed))


def test_votes_of_another_term_record_or_node_and_repeated_votes_do_not_count() -> None:
    leader, members = started()
    leader.commit_all(members)
    leader.exchange(members)
    term, record = leader.state.round.term, leader.proposal.hash
    one = members[0]
    assert "wrong-term:" in rejected(leader.send(Voted(one, 1, term - 1, record, b"")))
    assert "wrong-term:" in rejected(leader.send(Voted(one, 1, term + 1, record, b"")))
    assert "another record" in rejected(leader.send(Voted(one, 1, term, b"x" * 32, b"")))
    stranger = peer_id(99)
    assert "not-a-member:" in rejected(leader.send(Voted(stranger, 1, term, record, b"")))
    for _ in range(5):
        leader.vote(one)
    assert not leader.state.round.certified, "one vote five times is one vote"


def test_messages_from_unknown_nodes_change_nothing() -> None:
    leader, _ = started()
    assert leader.send(Seen(peer_id(99))) == []
    assert leader.send(Left(peer_id(99), "bye")) == []
    assert peer_id(99) not in leader.state.peers
    assert leader.send(Tick()) == []
    assert rejected(leader.send(Fetched(peer_id(99), 1, frozenset())))


def test_a_restarted_round_rejects_commitments_to_the_first_attempt() -> None:
    """The author trains again, so it could not reveal the first commitment and would be waited for."""
    leader, members = started()
    first = leader.plan
    leader.wait(RULES.round_bounds[1] + 1)
    assert leader.plan.round == first.round
    assert leader.plan.term > first.term
    stale = contribution(members[0], first).commitment(members[0], RUN_ID, first.round)
    assert "wrong-term:" in rejected(leader.send(Committed(members[0], first.round, first.term, stale, b"")))
    leader.run_round(members)
    assert len(leader.certified[1].accepted) == len(members)
