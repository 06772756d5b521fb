"""Malicious members in a sharded round cost the others a deadline or an attempt, never the run or a wrong result."""

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
from tests.protocol.one_leader import GENESIS, RULES, Leader, root_after, started
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
"""Seconds in which every stage of a round can reach its longest deadline many times."""


def sharded(count: int, **changes: object) -> tuple[Leader, list[str]]:
    return started(count, **{"sharded_from": 2, "slices": (3 * count,), **changes})


def reducing(leader: Leader) -> bool:
    current = leader.state.round
    return current is not None and current.stage is Stage.REDUCING


class Hostile:
    """A member that acts like any other until the reduction, except for what a subclass overrides."""

    def __init__(self, leader: Leader, me: str) -> None:
        self.leader, self.me = leader, me

    def gets(self, node: str, author: str, group: int) -> bool:
        """Whether ``node`` can fetch an author's slices of ``group``: a subclass may withhold its own."""
        return True

    def act(self) -> None:
        current = self.leader.state.round
        if current is None or current.plan.member(self.me) is None or self.me not in self.leader.state.peers:
            return
        if current.stage is Stage.COMMITTING:
            if self.me not in current.commitments:
                self.leader.commit(self.me)
            return
        if self.me in current.commitments and self.me not in current.contributions:
            self.leader.reveal(self.me)
        if not current.certified:
            self.hold()
        if reducing(self.leader):
            self.reduce()
        current = self.leader.state.round
        if current is not None and current.proposal is not None and not current.certified:
            self.vote()
        current = self.leader.state.round
        if current is not None and current.certified and self.me not in current.attestations:
            self.attest()

    def hold(self) -> None:
        self.report_held(round_of(self.leader).contributions)

    def report_held(self, held: Iterable[str]) -> None:
        current, nodes = round_of(self.leader), frozenset(held)
        if current.holdings.get(self.me) != nodes:
            self.leader.send(Fetched(self.me, current.plan.round, nodes))

    def reduce(self) -> None:
        report(self.leader, self.me)

    def vote(self) -> None:
        current = round_of(self.leader)
        if current.proposal is not None and self.me in current.proposal.electorate and self.me not in current.votes:
            self.leader.vote(self.me)

    def attest(self) -> None:
        self.leader.attest(self.me)


class Silent(Hostile):
    def reduce(self) -> None: ...


class Lying(Hostile):
    def reduce(self) -> None:
        report(self.leader, self.me, WRONG)


class LyingWithoutVote(Lying):
    def vote(self) -> None: ...

    def attest(self) -> None:
        self.leader.attest(self.me, WRONG)


class LyingOnHalf(Hostile):
    """Reports wrong results, on every other group."""

    def reduce(self) -> None:
        current = round_of(self.leader)
        groups = assignment(self.leader).duties(self.me)[::2]
        self.leader.send(
            Reported(self.me, current.plan.round, reduction_of(current).term, dict.fromkeys(groups, WRONG))
        )


class Contradicting(Hostile):
    def reduce(self) -> None:
        report(self.leader, self.me)
        if reducing(self.leader):
            current = round_of(self.leader)
            groups = assignment(self.leader).duties(self.me)
            self.leader.send(
                Reported(self.me, current.plan.round, reduction_of(current).term, dict.fromkeys(groups, WRONG))
            )


class Withholding(Lying):
    """Withholds from all nodes those slices of its payload that its own groups reduce, so that only it can report."""

    def gets(self, node: str, author: str, group: int) -> bool:
        current = round_of(self.leader)
        if author != self.me or not reduction_of(current).reducer_order:
            return author != self.me or not reduction_of(current).selected
        around = reduction_of(current).reducer_order[group:] + reduction_of(current).reducer_order[:group]
        return self.me not in around[: current.plan.reducers]


class WithholdingFromOne(Lying):
    """Withholds its payload from a single other node."""

    def gets(self, node: str, author: str, group: int) -> bool:
        return author != self.me or node != min(n.node for n in round_of(self.leader).plan.members if n.node != self.me)


class WithholdingLate(Lying):
    """Serves its payload until it is selected, then only to the assigned reducers: replacements cannot fetch it."""

    def gets(self, node: str, author: str, group: int) -> bool:
        current = round_of(self.leader)
        if author != self.me or not reduction_of(current).selected:
            return True
        around = reduction_of(current).reducer_order[group:] + reduction_of(current).reducer_order[:group]
        return node in around[: current.plan.reducers]

    def reduce(self) -> None: ...


class ClaimingNothing(Silent):
    def hold(self) -> None:
        self.report_held([])


class DenyingPayload(Silent):
    """Reports that one honest payload is unavailable."""

    def hold(self) -> None:
        honest = sorted(set(round_of(self.leader).contributions) - {self.me})
        self.report_held(set(round_of(self.leader).contributions) - set(honest[:1]))


class DenyingPayloadLate(DenyingPayload):
    """Reports it only once the payload is selected."""

    def hold(self) -> None:
        if reduction_of(round_of(self.leader)).selected:
            super().hold()
        else:
            Hostile.hold(self)


class Flapping(Hostile):
    def reduce(self) -> None:
        self.leader.send(Left(self.me, "bye"))
        state = self.leader.state
        root = GENESIS if int(self.leader.now) % 2 else state.state_root
        self.leader.send(Arrived(self.me, root, "cpu", state.rounds))


class Spamming(Hostile):
    """Sends many empty reports, so that reductions look fast."""

    def reduce(self) -> None:
        current = round_of(self.leader)
        for _ in range(5):
            self.leader.send(Reported(self.me, current.plan.round, reduction_of(current).term, {}))


BEHAVIOURS = [
    Silent,
    Lying,
    LyingWithoutVote,
    LyingOnHalf,
    Contradicting,
    Withholding,
    WithholdingFromOne,
    WithholdingLate,
    ClaimingNothing,
    DenyingPayload,
    DenyingPayloadLate,
    Flapping,
    Spamming,
]


@pytest.mark.parametrize("count", [3, 4, 5, 7])
@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda b: b.__name__)
def test_one_malicious_member_stops_no_run_and_changes_no_result(count: int, behaviour: type[Hostile]) -> None:
    leader, members = sharded(count, rounds=3)
    for index in (0, 1):
        one = Leader(leader.rules, leader.state, leader.now)
        hostile = behaviour(one, members[index])
        honest = Honest(one, [node for node in members if node != hostile.me], hostile.gets)
        honest.live(LONG, hostile.act)
        assert one.state.phase is Phase.FINISHED, one.state.note
        for record in one.certified.values():
            if record.results:
                assert record.results == right_results(record)
            assert set(record.dissenters) <= {hostile.me}
            if (behaviour, count) != (DenyingPayload, 3):  # two of three are no quorum, with gather either
                assert not {excluded.node for excluded in record.excluded} & set(honest.nodes)


@pytest.mark.parametrize("behaviour", [Silent, Lying, Contradicting, Withholding, ClaimingNothing, DenyingPayload])
def test_of_two_members_a_malicious_one_cannot_stop_the_other(behaviour: type[Hostile]) -> None:
    leader, members = sharded(2, rounds=2)
    hostile = behaviour(leader, members[0])
    Honest(leader, members[1:], hostile.gets).live(2 * LONG, hostile.act)
    assert leader.state.phase is Phase.FINISHED, leader.state.note


def test_rounds_stay_sharded_although_one_member_lies() -> None:
    """A lying reducer costs a stage but does not force a fallback to gather."""
    leader, members = sharded(5, rounds=4)
    hostile = Lying(leader, members[0])
    Honest(leader, members[1:]).live(LONG, hostile.act)
    assert len(leader.certified) == 4
    assert all(record.results and record.dissenters == (hostile.me,) for record in leader.certified.values())


def test_colluding_reducers_cannot_certify_a_result_that_they_withhold() -> None:
    """Both reducers of a group agree on a root, vote for it and serve its bytes to no node."""
    leader, members = sharded(7, rounds=1)
    honest = Honest(leader, members)
    honest.exchange()
    pair = [Lying(leader, node) for node in assignment(leader).reducers_of(0)]
    honest.nodes = [node for node in members if node not in {one.me for one in pair}]

    def collude() -> None:
        for one in pair:
            one.act()

    honest.live(LONG, collude)
    assert leader.state.phase is Phase.FINISHED, leader.state.note
    (record,) = leader.certified.values()
    assert WRONG not in record.results
    assert len(record.electorate) > len(pair)
    assert leader.state.state_root == root_after(record)


@pytest.mark.parametrize("reducers", [1, 2, 3])
def test_the_round_survives_when_all_reducers_of_a_group_die_after_reporting(reducers: int) -> None:
    """Their result is lost with them; others recompute it within the round."""
    leader, members = sharded(6, rounds=1, reducers=reducers, silence=3.0)
    honest = Honest(leader, members)
    honest.exchange()
    for node in members:
        honest._reduce(node, round_of(leader))
    record = leader.proposal
    lost = {node for node, root in reduction_of(round_of(leader)).reports[0].items() if root == record.results[0]}
    assert len(lost) == reducers
    term = leader.plan.term
    honest.nodes = [node for node in members if node not in lost]
    honest.live(200, alive=honest.nodes)
    assert leader.state.phase is Phase.FINISHED, leader.state.note
    (certified,) = leader.certified.values()
    assert certified.plan.term == term, "the attempt was restarted"
    assert {one.node for one in certified.accepted} == set(members)
    assert certified.results == right_results(certified)


def test_reducers_that_failed_for_a_withheld_payload_are_accepted_again() -> None:
    leader, members = sharded(7, rounds=1)
    hostile = WithholdingFromOne(leader, members[3])
    honest = Honest(leader, [node for node in members if node != hostile.me], hostile.gets)
    honest.live(LONG, hostile.act)
    (record,) = leader.certified.values()
    assert set(honest.nodes) <= {one.node for one in record.accepted}


def test_a_failed_sharded_attempt_falls_back_to_gather_for_that_round_only() -> None:
    """Of two members one contradicts the other, so no majority is possible."""
    leader, members = sharded(2, rounds=2)
    hostile = Lying(leader, members[0])
    Honest(leader, members[1:]).live(2 * LONG, hostile.act)
    plans = [(effect.plan.round, effect.plan.reducers) for effect in leader.effects if isinstance(effect, Planned)]
    assert plans == [(1, 2), (1, 0), (2, 2), (2, 0)]


def test_reduction_deadlines_follow_the_observed_durations() -> None:
    """They follow the durations of reductions, not those of fetching."""
    leader, members = sharded(4, rounds=9)
    honest = Honest(leader, members)
    for _ in range(3):
        number = leader.plan.round
        honest.exchange()
        leader.wait(30)
        assert reduction_of(round_of(leader)).failed == frozenset(), "a reducer as slow as before must not fail"
        honest.live(3)
        assert number in leader.certified


def test_a_single_report_counts_only_when_no_other_member_is_left() -> None:
    leader, members = sharded(5, rounds=1, silence=3.0)
    honest = Honest(leader, members)
    honest.exchange()
    alone = Honest(leader, members[:1])
    alone.live(100, alive=members[:1])
    assert leader.state.phase is Phase.FINISHED
    (record,) = leader.certified.values()
    assert record.electorate == tuple(members[:1])
    assert record.results == right_results(record)


def test_a_restarted_coordinator_continues_after_a_sharded_round() -> None:
    leader, members = sharded(4, rounds=3)
    honest = Honest(leader, members)
    while 1 not in leader.certified or leader.state.rounds < 1:
        honest.turn()
    new = Leader(leader.rules, now=leader.now)
    new.send(Restored(leader.certified[1]))
    new.certified = {1: leader.certified[1]}
    new.arrive(members, root_after(leader.certified[1]))
    Honest(new, members).live(LONG)
    assert new.state.phase is Phase.FINISHED
    assert all(effect.record.results for effect in new.effects if isinstance(effect, Certified))


def test_attestations_before_the_results_are_certified_are_ignored() -> None:
    leader, members = sharded(4)
    honest = Honest(leader, members)
    honest.exchange()
    assert reducing(leader)
    before = leader.state
    leader.send(Attested(members[0], 1, WRONG))
    assert leader.state == before
    assert right(leader.plan.seed, 0, members) != right(leader.plan.seed, 1, members)
