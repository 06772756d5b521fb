"""Sharded rounds: who adds up what, whose result is believed, and what happens when reducers fail or lie."""

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
from tests.protocol.one_leader import GENESIS, RUN_ID, Table, contribution, nodes, rejected, started

LIMITS = settings(max_examples=150, deadline=None)


def right(table: Table, group: int) -> bytes:
    """What honest reducers find for a group of what is selected now."""
    assert table.state.round is not None
    return digest(
        "result", table.plan.seed, bytes([group]), "".join(sorted(table.state.round.reduction.selected)).encode()
    )


def assignment(table: Table) -> ReducerAssignment:
    assert table.state.round is not None
    return assignment_of(table.rules, table.plan, table.state.round.reduction)


def report(table: Table, node: str, results: Mapping[int, bytes] | None = None) -> list[Effect]:
    """``node`` reports on all groups it reduces, honestly unless ``results`` say otherwise."""
    assert table.state.round is not None
    found = {group: right(table, group) for group in assignment(table).duties(node)} if results is None else results
    return table.send(Reported(node, table.plan.round, table.state.round.reduction.term, found))


def reducing(count: int = 4, **changes: object) -> tuple[Table, list[str]]:
    """A table at which all payloads are there and are to be reduced."""
    table, members = started(count, **{"sharded_from": 2, **changes})
    table.state = replace(table.state, reduce_seconds=(1.0,), result_seconds=(1.0,))  # of rounds before
    table.close(members)
    table.exchange(members)
    assert table.state.round is not None
    assert table.state.round.reduction.selected == frozenset(members)
    return table, members


def finish(table: Table, members: Iterable[str]) -> None:
    members = list(members)
    table.certify(members)
    effects = [effect for node in members for effect in table.attest(node)]
    assert any(isinstance(effect, StateAgreed) for effect in effects)


def test_a_sharded_round_from_plan_to_record() -> None:
    table, members = reducing()
    assert table.plan.reducers == 2
    assert table.state.phase is Phase.CERTIFYING
    for node in members:
        report(table, node)
    record = table.proposal
    commitments = {node: contribution(node, table.plan).commitment(node, RUN_ID, 1) for node in members}
    assert record.reducer_order == reducer_order(table.plan, commitments)
    assert record.results == tuple(right(table, group) for group in range(4))
    assert record.dissenters == ()
    finish(table, members)


def test_few_members_aggregate_everything() -> None:
    table, members = started(4, sharded_from=5)
    assert table.plan.reducers == 0
    assert table.play_round(members).results == ()


def test_a_reducer_that_dies_is_replaced_within_the_round() -> None:
    table, members = reducing()
    lost = members[0]
    for node in members[1:]:
        report(table, node)
    table.send(Left(lost, "it was stopped"))
    assert table.state.round is not None
    assert table.state.round.reduction.failed == {lost}
    assert lost not in {node for group in range(4) for node in assignment(table).reducers_of(group)}
    for node in members[1:]:
        report(table, node)
    assert table.proposal.plan.round == 1
    assert len(table.proposal.accepted) == 4, "its work is there, and counts"
    finish(table, members[1:])


def test_a_reducer_that_lives_and_says_nothing_is_replaced_at_the_deadline() -> None:
    table, members = reducing()
    for node in members[1:]:
        report(table, node)
    table.wait(6)
    assert table.state.round is not None
    assert table.state.round.reduction.failed == {members[0]}
    for node in members[1:]:
        report(table, node)
    assert table.proposal.plan.round == 1
    finish(table, members)


@pytest.mark.parametrize("liar", range(4))
def test_a_reducer_that_lies_is_outvoted_and_named(liar: int) -> None:
    table, members = reducing()
    lying = members[liar]
    wrong = dict.fromkeys(assignment(table).duties(lying), b"w" * 32)
    for node in members:
        report(table, node, wrong if node == lying else None)
    assert table.state.round is not None
    assert table.state.round.proposal is None, "one word stands against another: a third is asked"
    assert set(table.state.round.reduction.reassigned) == set(wrong)
    for node in members:
        report(table, node, wrong if node == lying else None)
    assert table.proposal.results == tuple(right(table, group) for group in range(4))
    assert table.proposal.dissenters == (lying,)
    finish(table, members)


def test_where_nobody_is_left_to_decide_the_round_starts_again() -> None:
    table, members = reducing(2)
    report(table, members[0])
    effects = report(table, members[1], {0: b"w" * 32, 1: b"w" * 32})
    assert any(isinstance(effect, Abandoned) for effect in effects)


def test_a_contribution_that_reducers_cannot_get_is_given_up() -> None:
    table, members = reducing()
    withheld = members[3]
    for node in members[:3]:
        table.hold(node, members[:3])  # after duties grew, say: there it turned out
    table.wait(6)
    assert table.state.round is not None
    selected = table.state.round.reduction.selected
    if selected == frozenset(members):  # somebody else holds all of it for some groups
        table.wait(60)
        selected = table.state.round.reduction.selected if table.state.round else frozenset()
    assert withheld not in selected or table.state.round is None


def test_reports_that_are_refused() -> None:
    table, members = reducing()
    node = members[0]
    other = next(group for group in range(4) if group not in assignment(table).duties(node))
    assert "invalid: the report names groups" in rejected(report(table, node, {other: b"x" * 32}))
    report(table, node)
    mine = assignment(table).duties(node)[0]
    assert "conflict:" in rejected(report(table, node, {mine: b"x" * 32}))
    assert "not-a-member:" in rejected(report(table, nodes(9)[8], {}))
    assert table.state.round is not None
    late = Reported(node, 1, table.state.round.reduction.term + 1, {})
    assert "wrong-term:" in rejected(table.send(late))


@settings(max_examples=75)
@given(data=st.data())
def test_whatever_reducers_do_a_record_holds_what_most_of_them_found(data: st.DataObject) -> None:
    """Two of seven lie as they like, one vanishes; k = 3, so that the honest are the most for every group."""
    table, members = reducing(7, reducers=3, slices=(11,))
    order = data.draw(st.permutations(members))
    liars, gone = set(order[:1]), order[2]
    alive = [node for node in members if node != gone]
    for _ in range(12):
        current = table.state.round
        if current is None or current.proposal is not None:
            break
        for node in data.draw(st.permutations(alive)):
            lies = dict.fromkeys(assignment(table).duties(node), b"w" * 32) if node in liars else None
            if table.state.round is not None and table.state.round.stage is Stage.REDUCING:
                report(table, node, lies)
        table.wait(data.draw(st.sampled_from([1, 4])), alive=alive)
    assert table.state.round is not None
    record = table.proposal
    assert record.results == tuple(right(table, group) for group in range(7))
    assert set(record.dissenters) <= liars
    for node in alive:
        if table.state.round is not None and not table.state.round.certified:
            table.vote(node)
    assert any(isinstance(effect, Certified) for effect in table.effects)


def weighted(weights: Mapping[str, int]) -> Plan:
    """A plan of round 1 with these voting weights."""
    members = tuple(Member(node, 5, weight) for node, weight in sorted(weights.items()))
    return Plan(1, 1, RUN_ID, GENESIS, round_seed(RUN_ID), 0, "sharded", 2, members)


def test_only_voters_reduce_and_split_weight_gets_at_most_twice_its_share() -> None:
    """Two voteless strangers were the reducers of a group and wrote 3.4e38 into the model."""
    honest, strangers, names = nodes(60)[:10], nodes(60)[10:20], nodes(60)[20:]
    for split in (1, 4, 10, 40):
        for tenths in (1, 2, 3):
            whole = 10**6 * tenths // (10 - tenths)  # so many tenths of the weight, split over names
            weights = dict.fromkeys(honest, 10**5) | dict.fromkeys(strangers, 0)
            weights |= dict.fromkeys(names[:split], whole // split)
            plan = weighted(weights)
            order = reducer_order(plan, {member.node: digest(member.node, b"") for member in plan.members})
            assert not set(order) & set(strangers)
            assert set(honest) <= set(order)
            assert sum(node in names for node in order) <= 2 * tenths / 10 * len(order) + 1


def test_no_key_fits_a_place_before_the_others_have_committed() -> None:
    """12 pairs of keys were enough to sit side by side when the order was drawn from the names."""
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
def test_work_is_dealt_evenly_and_completely(size: int, slices: int, k: int, seed: bytes) -> None:
    members = nodes(size)
    order = reducer_order(weighted(dict.fromkeys(members, 7)), {node: digest(node, seed) for node in members})
    assert sorted(order) == members
    drawn = ReducerAssignment(order, frozenset(), (), k, slices)
    assert sorted(number for group in range(drawn.groups) for number in drawn.slices_of(group)) == list(range(slices))
    sizes = [len(drawn.slices_of(group)) for group in range(drawn.groups)]
    assert max(sizes) - min(sizes) <= 1
    load = Counter(node for group in range(drawn.groups) for node in drawn.reducers_of(group))
    assert all(len(set(drawn.reducers_of(group))) == min(k, size) for group in range(drawn.groups))
    if drawn.groups == size:
        assert set(load.values()) == {min(k, size)}
    for node in members:
        assert drawn.duties(node) == tuple(g for g in range(drawn.groups) if node in drawn.reducers_of(g))


@LIMITS
@given(st.dictionaries(st.sampled_from(nodes(9)), st.sampled_from([b"a", b"b", b"c"])))
def test_a_verdict_is_what_more_than_half_say(reports: dict[str, bytes]) -> None:
    root = verdict(reports)
    counts = Counter(reports.values())
    assert (root is not None) == any(2 * count > len(reports) for count in counts.values())
    if root is not None:
        assert 2 * counts[root] > len(reports)
        assert len(dissenters(reports, root)) == len(reports) - counts[root]
