"""Members that do their worst in a sharded round: the others lose a deadline or an attempt, never run or truth."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from psyche.protocol.round_state import (
    Arrived,
    Attested,
    Certified,
    Fetched,
    Left,
    Phase,
    Planned,
    Reported,
    Restored,
    Stage,
)
from tests.protocol.one_leader import GENESIS, RULES, Table, root_after, started
from tests.protocol.sharded_members import (
    WRONG,
    Honest,
    assignment,
    reduction_of,
    report,
    right,
    right_results,
    round_of,
)

LONG = 8 * (RULES.round_bounds[1] + 4 * RULES.exchange_bounds[1])
"""Seconds in which every stage of a round can run into its longest deadline, many times over."""


def sharded(count: int, **changes: object) -> tuple[Table, list[str]]:
    return started(count, **{"sharded_from": 2, "slices": (3 * count,), **changes})


def reducing(table: Table) -> bool:
    current = table.state.round
    return current is not None and current.stage is Stage.REDUCING


class Hostile:
    """A member that takes part like any other up to the reduction, but for what a behaviour changes."""

    def __init__(self, table: Table, me: str) -> None:
        self.table, self.me = table, me

    def gets(self, node: str, author: str, group: int) -> bool:
        """What others get: a behaviour may withhold its own."""
        return True

    def act(self) -> None:
        current = self.table.state.round
        if current is None or current.plan.member(self.me) is None or self.me not in self.table.state.peers:
            return
        if current.stage is Stage.COMMITTING:
            if self.me not in current.commitments:
                self.table.commit(self.me)
            return
        if self.me in current.commitments and self.me not in current.contributions:
            self.table.open(self.me)
        if not current.certified:
            self.hold()
        if reducing(self.table):
            self.reduce()
        current = self.table.state.round
        if current is not None and current.proposal is not None and not current.certified:
            self.vote()
        current = self.table.state.round
        if current is not None and current.certified and self.me not in current.attestations:
            self.attest()

    def hold(self) -> None:
        self.say(round_of(self.table).contributions)

    def say(self, held: Iterable[str]) -> None:
        current, nodes = round_of(self.table), frozenset(held)
        if current.holdings.get(self.me) != nodes:
            self.table.send(Fetched(self.me, current.plan.round, nodes))

    def reduce(self) -> None:
        report(self.table, self.me)

    def vote(self) -> None:
        current = round_of(self.table)
        if current.proposal is not None and self.me in current.proposal.electorate and self.me not in current.votes:
            self.table.vote(self.me)

    def attest(self) -> None:
        self.table.attest(self.me)


class Silent(Hostile):
    def reduce(self) -> None: ...


class Lying(Hostile):
    def reduce(self) -> None:
        report(self.table, self.me, WRONG)


class LyingAndMute(Lying):
    def vote(self) -> None: ...

    def attest(self) -> None:
        self.table.attest(self.me, WRONG)


class LyingOnHalf(Hostile):
    """Reports on some of its groups only, and wrongly."""

    def reduce(self) -> None:
        current = round_of(self.table)
        groups = assignment(self.table).duties(self.me)[::2]
        self.table.send(Reported(self.me, current.plan.round, reduction_of(current).term, dict.fromkeys(groups, WRONG)))


class Contradicting(Hostile):
    def reduce(self) -> None:
        report(self.table, self.me)
        if reducing(self.table):
            current = round_of(self.table)
            groups = assignment(self.table).duties(self.me)
            self.table.send(
                Reported(self.me, current.plan.round, reduction_of(current).term, dict.fromkeys(groups, WRONG))
            )


class Withholding(Lying):
    """Nobody gets what the groups it reduces take of its own payload, so that its word on them might stand alone."""

    def gets(self, node: str, author: str, group: int) -> bool:
        current = round_of(self.table)
        if author != self.me or not reduction_of(current).reducer_order:
            return author != self.me or not reduction_of(current).selected
        around = reduction_of(current).reducer_order[group:] + reduction_of(current).reducer_order[:group]
        return self.me not in around[: current.plan.reducers]


class WithholdingFromOne(Lying):
    """The same towards a single other node."""

    def gets(self, node: str, author: str, group: int) -> bool:
        return author != self.me or node != min(n.node for n in round_of(self.table).plan.members if n.node != self.me)


class WithholdingLate(Lying):
    """Serves its payload until it is selected, and nothing from then on: replacements cannot get it."""

    def gets(self, node: str, author: str, group: int) -> bool:
        current = round_of(self.table)
        if author != self.me or not reduction_of(current).selected:
            return True
        around = reduction_of(current).reducer_order[group:] + reduction_of(current).reducer_order[:group]
        return node in around[: current.plan.reducers]

    def reduce(self) -> None: ...


class ClaimingNothing(Silent):
    def hold(self) -> None:
        self.say([])


class Slandering(Silent):
    """Says that one honest payload is not to be had."""

    def hold(self) -> None:
        honest = sorted(set(round_of(self.table).contributions) - {self.me})
        self.say(set(round_of(self.table).contributions) - set(honest[:1]))


class SlanderingLate(Slandering):
    """Says so once it is to reduce."""

    def hold(self) -> None:
        if reduction_of(round_of(self.table)).selected:
            super().hold()
        else:
            Hostile.hold(self)


class Flapping(Hostile):
    def reduce(self) -> None:
        self.table.send(Left(self.me, "bye"))
        state = self.table.state
        root = GENESIS if int(self.table.now) % 2 else state.state_root
        self.table.send(Arrived(self.me, root, "cpu", state.rounds))


class Spamming(Hostile):
    """Reports on nothing, again and again, so that reductions look fast."""

    def reduce(self) -> None:
        current = round_of(self.table)
        for _ in range(5):
            self.table.send(Reported(self.me, current.plan.round, reduction_of(current).term, {}))


BEHAVIOURS = [
    Silent,
    Lying,
    LyingAndMute,
    LyingOnHalf,
    Contradicting,
    Withholding,
    WithholdingFromOne,
    WithholdingLate,
    ClaimingNothing,
    Slandering,
    SlanderingLate,
    Flapping,
    Spamming,
]


@pytest.mark.parametrize("count", [3, 4, 5, 7])
@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda b: b.__name__)
def test_one_hostile_member_stops_no_run_and_changes_no_result(count: int, behaviour: type[Hostile]) -> None:
    table, members = sharded(count, rounds=3)
    for place in (0, 1):
        one = Table(table.rules, table.state, table.now)
        hostile = behaviour(one, members[place])
        honest = Honest(one, [node for node in members if node != hostile.me], hostile.gets)
        honest.live(LONG, hostile.act)
        assert one.state.phase is Phase.FINISHED, one.state.note
        for record in one.certified.values():
            if record.results:
                assert record.results == right_results(record)
            assert set(record.dissenters) <= {hostile.me}
            if (behaviour, count) != (Slandering, 3):  # two of three are no quorum, with gather neither
                assert not {excluded.node for excluded in record.excluded} & set(honest.nodes)


@pytest.mark.parametrize("behaviour", [Silent, Lying, Contradicting, Withholding, ClaimingNothing, Slandering])
def test_of_two_members_one_cannot_stop_the_other(behaviour: type[Hostile]) -> None:
    table, members = sharded(2, rounds=2)
    hostile = behaviour(table, members[0])
    Honest(table, members[1:], hostile.gets).live(2 * LONG, hostile.act)
    assert table.state.phase is Phase.FINISHED, table.state.note


def test_most_rounds_are_sharded_although_one_member_lies() -> None:
    """A liar costs a stage, not the way of exchange."""
    table, members = sharded(5, rounds=4)
    hostile = Lying(table, members[0])
    Honest(table, members[1:]).live(LONG, hostile.act)
    assert len(table.certified) == 4
    assert all(record.results and record.dissenters == (hostile.me,) for record in table.certified.values())


def test_a_result_that_only_its_reducers_have_is_not_certified_among_them() -> None:
    """Two that reduce a group together agree on a root, vote for it, and show its bytes to nobody."""
    table, members = sharded(7, rounds=1)
    honest = Honest(table, members)
    honest.hand_in()
    pair = [Lying(table, node) for node in assignment(table).reducers_of(0)]
    honest.nodes = [node for node in members if node not in {one.me for one in pair}]

    def conspire() -> None:
        for one in pair:
            one.act()

    honest.live(LONG, conspire)
    assert table.state.phase is Phase.FINISHED, table.state.note
    (record,) = table.certified.values()
    assert WRONG not in record.results
    assert len(record.electorate) > len(pair)
    assert table.state.state_root == root_after(record)


@pytest.mark.parametrize("reducers", [1, 2, 3])
def test_all_reducers_of_a_group_die_after_they_reported(reducers: int) -> None:
    """Their result is gone with them; others find it anew, within the round."""
    table, members = sharded(6, rounds=1, reducers=reducers, silence=3.0)
    honest = Honest(table, members)
    honest.hand_in()
    for node in members:
        honest._reduce(node, round_of(table))
    record = table.proposal
    lost = {node for node, root in reduction_of(round_of(table)).reports[0].items() if root == record.results[0]}
    assert len(lost) == reducers
    term = table.plan.term
    honest.nodes = [node for node in members if node not in lost]
    honest.live(200, alive=honest.nodes)
    assert table.state.phase is Phase.FINISHED, table.state.note
    (certified,) = table.certified.values()
    assert certified.plan.term == term, "no attempt was lost"
    assert {one.node for one in certified.accepted} == set(members)
    assert certified.results == right_results(certified)


def test_whom_a_withheld_payload_put_out_may_help_again() -> None:
    table, members = sharded(7, rounds=1)
    hostile = WithholdingFromOne(table, members[3])
    honest = Honest(table, [node for node in members if node != hostile.me], hostile.gets)
    honest.live(LONG, hostile.act)
    (record,) = table.certified.values()
    assert set(honest.nodes) <= {one.node for one in record.accepted}


def test_an_attempt_that_came_to_nothing_is_gathered_and_the_next_round_sharded_again() -> None:
    """Of two, one contradicts the other: nobody is left to decide."""
    table, members = sharded(2, rounds=2)
    hostile = Lying(table, members[0])
    Honest(table, members[1:]).live(2 * LONG, hostile.act)
    plans = [(effect.plan.round, effect.plan.reducers) for effect in table.effects if isinstance(effect, Planned)]
    assert plans == [(1, 2), (1, 0), (2, 2), (2, 0)]


def test_reductions_that_take_long_are_waited_for_from_then_on() -> None:
    """Deadlines of the reduction follow what reductions took, not what fetching took."""
    table, members = sharded(4, rounds=9)
    honest = Honest(table, members)
    for _ in range(3):
        number = table.plan.round
        honest.hand_in()
        table.wait(30)
        assert reduction_of(round_of(table)).failed == frozenset(), "who takes as long as before is not put out"
        honest.live(3)
        assert number in table.certified


def test_a_lone_word_is_believed_only_where_nobody_else_is_here() -> None:
    table, members = sharded(5, rounds=1, silence=3.0)
    honest = Honest(table, members)
    honest.hand_in()
    alone = Honest(table, members[:1])
    alone.live(100, alive=members[:1])
    assert table.state.phase is Phase.FINISHED
    (record,) = table.certified.values()
    assert record.electorate == tuple(members[:1])
    assert record.results == right_results(record)


def test_a_coordinator_that_starts_again_goes_on_after_a_sharded_round() -> None:
    table, members = sharded(4, rounds=3)
    honest = Honest(table, members)
    while 1 not in table.certified or table.state.rounds < 1:
        honest.turn()
    new = Table(table.rules, now=table.now)
    new.send(Restored(table.certified[1]))
    new.certified = {1: table.certified[1]}
    new.arrive(members, root_after(table.certified[1]))
    Honest(new, members).live(LONG)
    assert new.state.phase is Phase.FINISHED
    assert all(effect.record.results for effect in new.effects if isinstance(effect, Certified))


def test_nobody_attests_a_round_before_its_results_are_final() -> None:
    table, members = sharded(4)
    honest = Honest(table, members)
    honest.hand_in()
    assert reducing(table)
    before = table.state
    table.send(Attested(members[0], 1, WRONG))
    assert table.state == before
    assert right(table.plan.seed, 0, members) != right(table.plan.seed, 1, members)
