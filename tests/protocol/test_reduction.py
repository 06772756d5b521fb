"""Sharded rounds: assignment of slices, majority results, and failing or malicious reducers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.numerics.digest import digest
from psyche.protocol.assignment import (
    ReducerAssignment,
    assignment_of,
    dissenters,
    reducer_order,
    verdict,
)
from psyche.protocol.messages import Member, Plan
from psyche.protocol.proposals import round_seed
from psyche.protocol.round_state import Abandoned, Certified, Effect, Left, Phase, Reported, Stage, StateAgreed
from tests.protocol.one_leader import GENESIS, RUN_ID, Leader, contribution, nodes, rejected, started

LIMITS = settings(max_examples=150, deadline=None)


def right(leader: Leader, group: int) -> bytes:
    """Return what honest reducers compute for a group of the selected contributions."""
    assert leader.state.round is not None
    return digest(
        "result", leader.plan.seed, bytes([group]), "".join(sorted(leader.state.round.reduction.selected)).encode()
    )


def assignment(leader: Leader) -> ReducerAssignment:
    assert leader.state.round is not None
    return assignment_of(leader.rules, leader.plan, leader.state.round.reduction)


def report(leader: Leader, node: str, results: Mapping[int, bytes] | None = None) -> list[Effect]:
    """Report on all groups that ``node`` reduces, honestly or with ``results``."""
    assert leader.state.round is not None
    found = {group: right(leader, group) for group in assignment(leader).duties(node)} if results is None else results
    return leader.send(Reported(node, leader.plan.round, leader.state.round.reduction.term, found))


def reducing(count: int = 4, **changes: object) -> tuple[Leader, list[str]]:
    """Return a leader whose members hold all payloads and are about to reduce."""
    leader, members = started(count, **{"sharded_from": 2, **changes})
    leader.state = replace(leader.state, reduce_seconds=(1.0,), result_seconds=(1.0,))  # of earlier rounds
    leader.commit_all(members)
    leader.exchange(members)
    assert leader.state.round is not None
    assert leader.state.round.reduction.selected == frozenset(members)
    return leader, members


def finish(leader: Leader, members: Iterable[str]) -> None:
    members = list(members)
    leader.certify(members)
    effects = [effect for node in members for effect in leader.attest(node)]
    assert any(isinstance(effect, StateAgreed) for effect in effects)


def test_a_sharded_round_goes_from_plan_to_record() -> None:
    leader, members = reducing()
    assert leader.plan.reducers == 2
    assert leader.state.phase is Phase.CERTIFYING
    for node in members:
        report(leader, node)
    record = leader.proposal
    commitments = {node: contribution(node, leader.plan).commitment(node, RUN_ID, 1) for node in members}
    assert record.reducer_order == reducer_order(leader.plan, commitments)
    assert record.results == tuple(right(leader, group) for group in range(4))
    assert record.dissenters == ()
    finish(leader, members)


def test_with_few_members_each_aggregates_everything() -> None:
    leader, members = started(4, sharded_from=5)
    assert leader.plan.reducers == 0
    assert leader.run_round(members).results == ()


def test_a_reducer_that_dies_is_replaced_within_the_round() -> None:
    leader, members = reducing()
    lost = members[0]
    for node in members[1:]:
        report(leader, node)
    leader.send(Left(lost, "it was stopped"))
    assert leader.state.round is not None
    assert leader.state.round.reduction.failed == {lost}
    assert lost not in {node for group in range(4) for node in assignment(leader).reducers_of(group)}
    for node in members[1:]:
        report(leader, node)
    assert leader.proposal.plan.round == 1
    assert len(leader.proposal.accepted) == 4, "its contribution still counts"
    finish(leader, members[1:])


def test_a_reducer_that_does_not_report_is_replaced_at_the_deadline() -> None:
    leader, members = reducing()
    for node in members[1:]:
        report(leader, node)
    leader.wait(6)
    assert leader.state.round is not None
    assert leader.state.round.reduction.failed == {members[0]}
    for node in members[1:]:
        report(leader, node)
    assert leader.proposal.plan.round == 1
    finish(leader, members)


@pytest.mark.parametrize("index", range(4))
def test_a_reducer_that_lies_is_outvoted_and_named(index: int) -> None:
    leader, members = reducing()
    malicious = members[index]
    wrong = dict.fromkeys(assignment(leader).duties(malicious), b"w" * 32)
    for node in members:
        report(leader, node, wrong if node == malicious else None)
    assert leader.state.round is not None
    assert leader.state.round.proposal is None, "two reports contradict each other: a third reducer is assigned"
    assert set(leader.state.round.reduction.reassigned) == set(wrong)
    for node in members:
        report(leader, node, wrong if node == malicious else None)
    assert leader.proposal.results == tuple(right(leader, group) for group in range(4))
    assert leader.proposal.dissenters == (malicious,)
    finish(leader, members)


def test_a_round_restarts_when_no_reducer_is_left_to_break_a_tie() -> None:
    leader, members = reducing(2)
    report(leader, members[0])
    effects = report(leader, members[1], {0: b"w" * 32, 1: b"w" * 32})
    assert any(isinstance(effect, Abandoned) for effect in effects)


def test_a_contribution_that_reducers_cannot_fetch_is_excluded() -> None:
    leader, members = reducing()
    withheld = members[3]
    for node in members[:3]:
        leader.hold(node, members[:3])  # as if discovered after a reassignment
    leader.wait(6)
    assert leader.state.round is not None
    selected = leader.state.round.reduction.selected
    if selected == frozenset(members):  # another node may still serve some groups
        leader.wait(60)
        selected = leader.state.round.reduction.selected if leader.state.round else frozenset()
    assert withheld not in selected or leader.state.round is None


def test_invalid_reports_are_rejected() -> None:
    leader, members = reducing()
    node = members[0]
    other = next(group for group in range(4) if group not in assignment(leader).duties(node))
    assert "invalid: the report names groups" in rejected(report(leader, node, {other: b"x" * 32}))
    report(leader, node)
    mine = assignment(leader).duties(node)[0]
    assert "conflict:" in rejected(report(leader, node, {mine: b"x" * 32}))
    assert "not-a-member:" in rejected(report(leader, nodes(9)[8], {}))
    assert leader.state.round is not None
    late = Reported(node, 1, leader.state.round.reduction.term + 1, {})
    assert "wrong-term:" in rejected(leader.send(late))


@settings(max_examples=75)
@given(data=st.data())
def test_a_record_holds_the_majority_result_whatever_one_reducer_reports(data: st.DataObject) -> None:
    """Of seven members one lies and one vanishes; with k = 3 the honest reducers are a majority in every group."""
    leader, members = reducing(7, reducers=3, slices=(11,))
    order = data.draw(st.permutations(members))
    malicious, gone = set(order[:1]), order[2]
    alive = [node for node in members if node != gone]
    for _ in range(12):
        current = leader.state.round
        if current is None or current.proposal is not None:
            break
        for node in data.draw(st.permutations(alive)):
            lies = dict.fromkeys(assignment(leader).duties(node), b"w" * 32) if node in malicious else None
            if leader.state.round is not None and leader.state.round.stage is Stage.REDUCING:
                report(leader, node, lies)
        leader.wait(data.draw(st.sampled_from([1, 4])), alive=alive)
    assert leader.state.round is not None
    record = leader.proposal
    assert record.results == tuple(right(leader, group) for group in range(7))
    assert set(record.dissenters) <= malicious
    for node in alive:
        if leader.state.round is not None and not leader.state.round.certified:
            leader.vote(node)
    assert any(isinstance(effect, Certified) for effect in leader.effects)


def weighted(weights: Mapping[str, int]) -> Plan:
    """A plan of round 1 with these voting weights."""
    members = tuple(Member(node, 5, weight) for node, weight in sorted(weights.items()))
    return Plan(1, 1, RUN_ID, GENESIS, round_seed(RUN_ID), 0, "sharded", 2, members)


def test_only_voters_reduce_and_split_weight_gets_at_most_twice_its_share() -> None:
    """Before this rule two nodes without a vote reduced a group and wrote 3.4e38 into the model."""
    honest, voteless, names = nodes(60)[:10], nodes(60)[10:20], nodes(60)[20:]
    for split in (1, 4, 10, 40):
        for tenths in (1, 2, 3):
            whole = 10**6 * tenths // (10 - tenths)  # this many tenths of the weight, split over identities
            weights = dict.fromkeys(honest, 10**5) | dict.fromkeys(voteless, 0)
            weights |= dict.fromkeys(names[:split], whole // split)
            plan = weighted(weights)
            order = reducer_order(plan, {member.node: digest(member.node, b"") for member in plan.members})
            assert not set(order) & set(voteless)
            assert set(honest) <= set(order)
            assert sum(node in names for node in order) <= 2 * tenths / 10 * len(order) + 1


def test_a_key_cannot_be_ground_for_a_position_before_the_others_have_committed() -> None:
    """When the order followed from the PeerIDs, 12 pairs of keys were enough to sit side by side."""
    members = nodes(8)
    plan = weighted(dict.fromkeys(members, 7))
    places = [
        reducer_order(plan, {node: digest(node, bytes([salt])) for node in members}).index(members[0])
        for salt in range(64)
    ]
    assert set(places) == set(range(8))


@LIMITS
@given(
    size=st.integers(1, 30), slices=st.integers(1, 60), k=st.integers(1, 5), seed=st.binary(min_size=32, max_size=32)
)
def test_slices_are_assigned_evenly_and_completely(size: int, slices: int, k: int, seed: bytes) -> None:
    members = nodes(size)
    order = reducer_order(weighted(dict.fromkeys(members, 7)), {node: digest(node, seed) for node in members})
    assert sorted(order) == members
    assigned = ReducerAssignment(order, frozenset(), (), k, slices)
    assert sorted(number for group in range(assigned.groups) for number in assigned.slices_of(group)) == list(
        range(slices)
    )
    sizes = [len(assigned.slices_of(group)) for group in range(assigned.groups)]
    assert max(sizes) - min(sizes) <= 1
    load = Counter(node for group in range(assigned.groups) for node in assigned.reducers_of(group))
    assert all(len(set(assigned.reducers_of(group))) == min(k, size) for group in range(assigned.groups))
    if assigned.groups == size:
        assert set(load.values()) == {min(k, size)}
    for node in members:
        assert assigned.duties(node) == tuple(g for g in range(assigned.groups) if node in assigned.reducers_of(g))


@LIMITS
@given(st.dictionaries(st.sampled_from(nodes(9)), st.sampled_from([b"a", b"b", b"c"])))
def test_a_result_needs_more_than_half_of_the_reports(reports: dict[str, bytes]) -> None:
    root = verdict(reports)
    counts = Counter(reports.values())
    assert (root is not None) == any(2 * count > len(reports) for count in counts.values())
    if root is not None:
        assert 2 * counts[root] > len(reports)
        assert len(dissenters(reports, root)) == len(reports) - counts[root]
