"""Whatever arrives, in whatever order, after whatever pauses: what must never happen does not.

The inspector of ``players.Table`` sees every transition: no round certified twice, every certificate with its
quorum, every accepted contribution committed to before closing, nobody from outside, no round skipped, results what
most of the reducers found, ``tick`` pure.
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
from tests.protocol.one_leader import GENESIS, RULES, RUN_ID, Table, contribution, nodes, peer_id, root_after
from tests.protocol.sharded_members import reduction_of, report

MEMBERS = nodes(4)
EVERYBODY = [*MEMBERS, peer_id(80), peer_id(81)]
VERBS = (
    *["due"] * 12,
    *["jump"] * 3,
    *("arrive", "leave", "seen", "tick", "bad commit", "bad open", "bad hold", "bad vote", "bad attest", "restore"),
    *("bad report", "wrong report", "wrong report"),
)
"""``due``: some of the members (a bit mask) do what an honest one would do next. The rest is mischief."""
WAYS = st.sampled_from([(None, 2), (2, 1), (2, 2), (3, 3)])
"""From how many members on rounds are sharded, and among how many reducers."""
STEPS = st.lists(st.tuples(st.sampled_from(VERBS), st.integers(1, 63), st.integers(0, 7)), min_size=40, max_size=90)


def do_what_is_due(table: Table, node: str, holds: frozenset[str] | None = None) -> None:
    current = table.state.round
    if current is None or current.plan.member(node) is None:
        return
    if current.stage is Stage.COMMITTING:
        table.commit(node)
    elif current.certified:
        table.attest(node)
    elif node in current.commitments and node not in current.contributions:
        table.open(node)
    elif current.proposal is None:
        table.hold(node, current.contributions if holds is None else holds)
        if table.state.round is not None and table.state.round.stage is Stage.REDUCING:
            report(table, node)
    elif node in current.proposal.electorate:
        table.vote(node)


def happen(table: Table, verb: str, who: int, what: int) -> None:
    node, current = EVERYBODY[who % 6], table.state.round
    number = current.plan.round if current else table.state.rounds + what % 3
    match verb:
        case "due":
            for place, one in enumerate(MEMBERS):
                if who >> place & 1:
                    do_what_is_due(table, one)
        case "tick":
            table.send(Tick())
        case "jump":
            if who % 4:
                table.wait((0.1, 1.0, 4.9, 5.0, 14.0, 16.0, 51.0, 110.0)[what], step=10)
            else:
                table.now += (0.1, 1.0, 4.9, 5.0, 14.0, 16.0, 51.0, 200.0)[what]
                table.send(Tick())
        case "seen":
            table.send(Seen(node))
        case "leave":
            table.send(Left(node, "bye"))
        case "arrive":
            root = (table.state.state_root, GENESIS, b"o" * 32)[what % 3] or GENESIS
            table.send(Arrived(node, root, "cpu", table.state.rounds))
        case "restore" if table.certified:
            table.send(Restored(table.certified[sorted(table.certified)[what % len(table.certified)]]))
        case "bad commit":
            table.send(Committed(node, number + what % 2, table.state.term, bytes([what]) * 32, b""))
        case "bad hold":
            table.send(Fetched(node, number, frozenset(EVERYBODY[what % 3 : what])))
        case "bad attest":
            table.send(Attested(node, number, bytes([what]) * 32))
        case "bad vote":
            term = (current.term if current else 0) + what % 3 - 1
            table.send(Voted(node, number, term, bytes([what]) * 32, b""))
        case _ if current is None:
            table.send(Tick())
        case "bad report":
            term = reduction_of(current).term + what % 3 - 1
            table.send(Reported(node, number, term, {what: bytes([what]) * 32, who % 5: bytes([what]) * 32}))
        case "wrong report" if reduction_of(current).selected and current.plan.member(node):
            report(table, node, bytes([what]) * 32)
        case "bad open":
            given_ = contribution(EVERYBODY[what % 6], current.plan, tokens=200 + what)
            table.send(Revealed(node, number, given_, b""))


@settings(max_examples=100, deadline=None)
@given(steps=STEPS, least=st.integers(1, 3), way=WAYS)
def test_any_interleaving(steps: list[tuple[str, int, int]], least: int, way: tuple[int | None, int]) -> None:
    table = Table(replace(RULES, min_members=least, sharded_from=way[0], reducers=way[1]))
    table.arrive(MEMBERS, GENESIS)
    for verb, who, what in steps:
        happen(table, verb, who, what)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, way=WAYS)
def test_the_run_goes_on_once_the_members_behave_again(
    steps: list[tuple[str, int, int]], way: tuple[int | None, int]
) -> None:
    """No sequence of events leaves a state from which good members cannot finish the run."""
    table = Table(replace(RULES, min_members=1, start_members=2, sharded_from=way[0], reducers=way[1]))
    table.arrive(MEMBERS, GENESIS)
    for verb, who, what in steps:
        happen(table, verb, who, what)
    for node in EVERYBODY:
        table.send(Left(node, "bye"))
    for _ in range(120):
        if table.state.phase is Phase.FINISHED:
            break
        current = table.state.round
        held = current.plan.base_root if current else (table.state.state_root or GENESIS)
        for node in MEMBERS:
            if node not in table.state.peers:
                root = root_after(current.proposal) if current and current.certified and current.proposal else held
                table.send(Arrived(node, root, "cpu", table.state.rounds))
            elif current is None and table.state.peers[node].state_root != held:
                table.send(Arrived(node, held, "cpu", table.state.rounds))
        for _ in range(5):
            happen(table, "due", 15, 0)
        table.wait(30, step=10)
    assert table.state.phase is Phase.FINISHED, table.state.note


@settings(max_examples=100, deadline=None)
@given(steps=STEPS, crash=st.integers(0, 59), way=WAYS)
def test_a_coordinator_that_restarts_goes_on_from_what_members_prove(
    steps: list[tuple[str, int, int]], crash: int, way: tuple[int | None, int]
) -> None:
    """It forgets everything; members that hold the last record bring it back, and no round is certified anew."""
    table = Table(replace(RULES, min_members=1, rounds=5, sharded_from=way[0], reducers=way[1]))
    table.arrive(MEMBERS, GENESIS)
    while not table.state.rounds:
        happen(table, "due", 15, 0)
    for verb, who, what in steps[:crash]:
        happen(table, verb, who, what)
    last = max(table.certified)
    new = Table(table.rules, now=table.now)
    new.certified = dict(table.certified)
    for number in (1, last):
        new.send(Restored(table.certified[number]))
    record = table.certified[last]
    assert new.state.rounds == last
    for node in record.voters:
        new.send(Arrived(node, root_after(record), "cpu", new.state.rounds))
    if new.state.phase is not Phase.FINISHED:
        assert new.plan.round == last + 1
        assert new.plan.previous == record.hash
        assert new.plan.base_root == root_after(record)
    for verb, who, what in steps[crash:]:
        happen(new, verb, who, what)


def test_an_opening_proves_its_commitment_to_anyone() -> None:
    """The inspector's own check is not vacuous: a commitment differs for another node, run and round."""
    table = Table()
    table.arrive(MEMBERS, GENESIS)
    one = contribution(MEMBERS[0], table.plan)
    assert one.commitment(MEMBERS[0], RUN_ID, 1) != one.commitment(MEMBERS[1], RUN_ID, 1)
