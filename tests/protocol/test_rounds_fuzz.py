"""Invariants of the round state machine under arbitrary sequences of events and pauses.

``one_leader.Leader`` checks every transition: no round is certified twice or skipped, every certificate has its quorum,
every accepted contribution was committed to before closing, no node from outside takes part, results are those of the
majority of reducers, and ``tick`` is pure.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.protocol.round_state import (
    Arrived,
    Attested,
    Committed,
    Fetched,
    Left,
    Phase,
    Reported,
    Restored,
    Revealed,
    Seen,
    Stage,
    Tick,
    Voted,
)
from tests.protocol.one_leader import GENESIS, RULES, RUN_ID, Leader, contribution, nodes, peer_id, root_after
from tests.protocol.sharded_members import reduction_of, report

MEMBERS = nodes(4)
NODES = [*MEMBERS, peer_id(80), peer_id(81)]
VERBS = (
    *["due"] * 12,
    *["jump"] * 3,
    *("arrive", "leave", "seen", "tick", "bad commit", "bad open", "bad hold", "bad vote", "bad attest", "restore"),
    *("bad report", "wrong report", "wrong report"),
)
"""``due``: those members in a bit mask do what an honest one would do next. The others are malicious or faulty."""
SHARDING = st.sampled_from([(None, 2), (2, 1), (2, 2), (3, 3)])
"""The number of members from which rounds are sharded, and the reducers per group."""
STEPS = st.lists(st.tuples(st.sampled_from(VERBS), st.integers(1, 63), st.integers(0, 7)), min_size=40, max_size=90)


def do_what_is_due(leader: Leader, node: str, holds: frozenset[str] | None = None) -> None:
    current = leader.state.round
    if current is None or current.plan.member(node) is None:
        return
    if current.stage is Stage.COMMITTING:
        leader.commit(node)
    elif current.certified:
        leader.attest(node)
    elif node in current.commitments and node not in current.contributions:
        leader.reveal(node)
    elif current.proposal is None:
        leader.hold(node, current.contributions if holds is None else holds)
        if leader.state.round is not None and leader.state.round.stage is Stage.REDUCING:
            report(leader, node)
    elif node in current.proposal.electorate:
        leader.vote(node)


def apply_event(leader: Leader, verb: str, who: int, what: int) -> None:
    node, current = NODES[who % 6], leader.state.round
    number = current.plan.round if current else leader.state.rounds + what % 3
    match verb:
        case "due":
            for index, one in enumerate(MEMBERS):
                if who >> index & 1:
                    do_what_is_due(leader, one)
        case "tick":
            leader.send(Tick())
        case "jump":
            if who % 4:
                leader.wait((0.1, 1.0, 4.9, 5.0, 14.0, 16.0, 51.0, 110.0)[what], step=10)
            else:
                leader.now += (0.1, 1.0, 4.9, 5.0, 14.0, 16.0, 51.0, 200.0)[what]
                leader.send(Tick())
        case "seen":
            leader.send(Seen(node))
        case "leave":
            leader.send(Left(node, "bye"))
        case "arrive":
            root = (leader.state.state_root, GENESIS, b"o" * 32)[what % 3] or GENESIS
            leader.send(Arrived(node, root, "cpu", leader.state.rounds))
        case "restore" if leader.certified:
            leader.send(Restored(leader.certified[sorted(leader.certified)[what % len(leader.certified)]]))
        case "bad commit":
            leader.send(Committed(node, number + what % 2, leader.state.term, bytes([what]) * 32, b""))
        case "bad hold":
            leader.send(Fetched(node, number, frozenset(NODES[what % 3 : what])))
        case "bad attest":
            leader.send(Attested(node, number, bytes([what]) * 32))
        case "bad vote":
            term = (current.term if current else 0) + what % 3 - 1
            leader.send(Voted(node, number, term, bytes([what]) * 32, b""))
        case _ if current is None:
            leader.send(Tick())
        case "bad report":
            term = reduction_of(current).term + what % 3 - 1
            leader.send(Reported(node, number, term, {what: bytes([what]) * 32, who % 5: bytes([what]) * 32}))
        case "wrong report" if reduction_of(current).selected and current.plan.member(node):
            report(leader, node, bytes([what]) * 32)
        case "bad open":
            given_ = contribution(NODES[what % 6], current.plan, tokens=200 + what)
            leader.send(Revealed(node, number, given_, b""))


@settings(max_examples=100, deadline=None)
@given(steps=STEPS, least=st.integers(1, 3), sharding=SHARDING)
def test_invariants_hold_under_any_interleaving(
    steps: list[tuple[str, int, int]], least: int, sharding: tuple[int | None, int]
) -> None:
    leader = Leader(replace(RULES, min_members=least, sharded_from=sharding[0], reducers=sharding[1]))
    leader.arrive(MEMBERS, GENESIS)
    for verb, who, what in steps:
        apply_event(leader, verb, who, what)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, sharding=SHARDING)
def test_the_run_finishes_once_all_members_are_honest_again(
    steps: list[tuple[str, int, int]], sharding: tuple[int | None, int]
) -> None:
    """No sequence of events leaves a state from which honest members cannot finish the run."""
    leader = Leader(replace(RULES, min_members=1, start_members=2, sharded_from=sharding[0], reducers=sharding[1]))
    leader.arrive(MEMBERS, GENESIS)
    for verb, who, what in steps:
        apply_event(leader, verb, who, what)
    for node in NODES:
        leader.send(Left(node, "bye"))
    for _ in range(120):
        if leader.state.phase is Phase.FINISHED:
            break
        current = leader.state.round
        held = current.plan.base_root if current else (leader.state.state_root or GENESIS)
        for node in MEMBERS:
            if node not in leader.state.peers:
                root = root_after(current.proposal) if current and current.certified and current.proposal else held
                leader.send(Arrived(node, root, "cpu", leader.state.rounds))
            elif current is None and leader.state.peers[node].state_root != held:
                leader.send(Arrived(node, held, "cpu", leader.state.rounds))
        for _ in range(5):
            apply_event(leader, "due", 15, 0)
        leader.wait(30, step=10)
    assert leader.state.phase is Phase.FINISHED, leader.state.note


@settings(max_examples=100, deadline=None)
@given(steps=STEPS, crash=st.integers(0, 59), sharding=SHARDING)
def test_a_restarted_coordinator_continues_from_what_its_members_prove(
    steps: list[tuple[str, int, int]], crash: int, sharding: tuple[int | None, int]
) -> None:
    """Members that hold the last record restore it, and no round is certified again."""
    leader = Leader(replace(RULES, min_members=1, rounds=5, sharded_from=sharding[0], reducers=sharding[1]))
    leader.arrive(MEMBERS, GENESIS)
    while not leader.state.rounds:
        apply_event(leader, "due", 15, 0)
    for verb, who, what in steps[:crash]:
        apply_event(leader, verb, who, what)
    last = max(leader.certified)
    new = Leader(leader.rules, now=leader.now)
    new.certified = dict(leader.certified)
    for number in (1, last):
        new.send(Restored(leader.certified[number]))
    record = leader.certified[last]
    assert new.state.rounds == last
    for node in record.voters:
        new.send(Arrived(node, root_after(record), "cpu", new.state.rounds))
    if new.state.phase is not Phase.FINISHED:
        assert new.plan.round == last + 1
        assert new.plan.previous == record.hash
        assert new.plan.base_root == root_after(record)
    for verb, who, what in steps[crash:]:
        apply_event(new, verb, who, what)


def test_a_commitment_binds_the_node_that_reveals_it() -> None:
    """So the harness's own check of commitments is not vacuous."""
    leader = Leader()
    leader.arrive(MEMBERS, GENESIS)
    one = contribution(MEMBERS[0], leader.plan)
    assert one.commitment(MEMBERS[0], RUN_ID, 1) != one.commitment(MEMBERS[1], RUN_ID, 1)
