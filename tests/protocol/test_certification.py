"""No round is certified twice under crashes, cuts, restarts and concurrent leaders, and the run continues.

``Cluster.sealed`` checks this; planted bugs show that the check works.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.protocol.acceptor import Acceptor
from psyche.protocol.messages import Plan
from psyche.protocol.round_state import Seen, Stage
from tests.protocol.many_leaders import Cluster, Coordinator, Voter, with_coordinators
from tests.protocol.one_leader import RULES, nodes

COUNTS = st.sampled_from([1, 2, 2, 3])
PROBATIONS = st.sampled_from([0, 2])
VERBS = (
    *(["talk"] * 16 + ["session"] * 16 + ["wait"] * 3 + ["up"] * 6),
    *(["half"] * 4 + ["begin"] * 2 + ["down"] * 2),
    *("long", "stop", "blackout", "cut", "heal"),
)
STEPS = st.lists(st.tuples(st.sampled_from(VERBS), st.integers(0, 15), st.integers(0, 2)), min_size=60, max_size=160)
MEMBERS = nodes(4)


def apply_step(cluster: Cluster, verb: str, who: int, which: int) -> None:
    coordinator = cluster.coordinators[which % len(cluster.coordinators)]
    voter = cluster.voters[who % len(cluster.voters)]
    match verb:
        case "talk":
            cluster.talk(voter, coordinator)
        case "session":  # most members, for at most as many turns as a round takes
            for _ in range(1 + who % 8):
                for place, one in enumerate(cluster.voters):
                    if place != who // 4 or who % 2:
                        cluster.talk(one, coordinator)
        case "half":
            for _ in range(6):
                for one in cluster.voters[2 * (who % 2) :][:2]:
                    cluster.talk(one, coordinator)
        case "blackout":
            for place, one in enumerate(cluster.voters):
                if place != who % 4:
                    one.crash()
        case "wait":
            cluster.wait(1.0 + who)
        case "long":
            cluster.wait(RULES.round_bounds[1] + who)
        case "begin":
            coordinator.begin()
        case "stop":
            coordinator.crash()
        case "down":
            voter.crash()
        case "up":
            voter.up = True
        case "cut" if len(cluster.coordinators) > 1:
            cluster.cut.add(frozenset((which % len(cluster.coordinators), (which + 1) % len(cluster.coordinators))))
        case "heal":
            cluster.cut.clear()


def run_steps(count: int, probation: int, steps: list[tuple[str, int, int]]) -> Cluster:
    cluster = Cluster(with_coordinators(RULES, count, probation), MEMBERS)
    for verb, who, which in steps:
        apply_step(cluster, verb, who, which)
    return cluster


@settings(max_examples=150, deadline=None)
@given(count=COUNTS, probation=PROBATIONS, steps=STEPS)
def test_no_round_is_certified_twice(count: int, probation: int, steps: list[tuple[str, int, int]]) -> None:
    run_steps(count, probation, steps)


@settings(max_examples=25, deadline=None)
@given(count=COUNTS, probation=PROBATIONS, steps=STEPS, which=st.integers(0, 2))
def test_the_run_continues_once_all_members_follow_one_coordinator(
    count: int, probation: int, steps: list[tuple[str, int, int]], which: int
) -> None:
    cluster = run_steps(count, probation, steps)
    coordinator = cluster.coordinators[which % count]
    for one in cluster.coordinators:
        one.leads = False
    coordinator.begin()
    before = max(cluster.certified, default=0)
    cluster.run_undisturbed(coordinator, 700)
    assert max(cluster.certified, default=0) > before + 1, coordinator.state.note


def schedule(seed: int, length: int = 160) -> list[tuple[str, int, int]]:
    dice = random.Random(seed)
    return [(dice.choice(VERBS), dice.randrange(16), dice.randrange(3)) for _ in range(length)]


@pytest.mark.slow
def test_twenty_thousand_random_schedules_certify_no_round_twice() -> None:
    certified = 0
    for seed in range(20_000):
        certified += len(run_steps(seed % 3 + 1, 2 * (seed % 2), schedule(seed)).certified)
    assert certified > 20_000, "the schedules make progress"


# ------------------------------------------------------------------------------------ planted bugs


def forgetting_the_promise(self: Voter) -> None:
    self.plan, self.commitments, self.reveals, self.up = None, {}, {}, False
    self.acceptor, self.accepted = Acceptor(), None


def losing_the_vote(self: Voter) -> None:
    """The vote was sent before it was persisted."""
    self.plan, self.commitments, self.reveals, self.up = None, {}, {}, False
    self.acceptor, self.accepted = replace(self.acceptor, term=0, record=b""), None


def half_is_enough(yes: int, total: int) -> bool:
    return total > 0 and 2 * yes >= total


def certified_but_unknown(count: int) -> Cluster:
    """Return a cluster in which a quorum has just voted, and no member knows that the round is certified."""
    cluster = Cluster(with_coordinators(RULES, count), MEMBERS)
    for _ in range(40):
        if cluster.certified:  # the other coordinator signed the first reconfiguration only
            cluster.cut.add(frozenset((0, 1)))
        for voter in cluster.voters[:3]:
            cluster.talk(voter, cluster.coordinators[0])
            if 2 in cluster.certified:
                return cluster
        if max(cluster.certified, default=0) == cluster.voters[3].chain.rounds or cluster.voters[3].chain.rounds == 0:
            cluster.talk(cluster.voters[3], cluster.coordinators[0])
    raise AssertionError("nothing was certified")


def keep_talking(cluster: Cluster, coordinator: Coordinator, voters: list[Voter], turns: int = 40) -> None:
    for _ in range(turns):
        for voter in voters:
            voter.up = True
            cluster.talk(voter, coordinator)
        if coordinator.later > coordinator.state.term:
            coordinator.begin()
        cluster.wait(1.0)


def the_leader_dies_and_its_voters_restart() -> None:
    cluster = certified_but_unknown(2)
    cluster.coordinators[0].crash()
    a, b, c, d = cluster.voters
    for voter in (a, b, c):
        voter.crash()
    cluster.coordinators[1].begin()
    keep_talking(cluster, cluster.coordinators[1], [a, b, d])
    assert max(cluster.certified) > 2


def two_leaders_with_two_members_each() -> None:
    cluster = Cluster(with_coordinators(RULES, 2), MEMBERS)
    keep_talking(cluster, cluster.coordinators[0], cluster.voters, 3)
    cluster.coordinators[1].later = cluster.coordinators[0].state.term
    while not cluster.certified:
        keep_talking(cluster, cluster.coordinators[0], cluster.voters, 1)
    keep_talking(cluster, cluster.coordinators[0], cluster.voters, 2)
    cluster.coordinators[1].begin()
    cluster.cut.add(frozenset((0, 1)))
    for _ in range(20):
        keep_talking(cluster, cluster.coordinators[0], cluster.voters[:2], 1)
        keep_talking(cluster, cluster.coordinators[1], cluster.voters[2:], 1)


def the_voters_of_a_sealed_record_leave_for_good() -> None:
    cluster = certified_but_unknown(1)
    for voter in cluster.voters[:3]:
        voter.crash()
    cluster.coordinators[0].crash()
    cluster.coordinators[0].begin()
    keep_talking(cluster, cluster.coordinators[0], cluster.voters[3:], 400)


def a_slow_voter_while_the_other_coordinator_is_away() -> None:
    """All three votes are needed: a reconfiguration without the third needs both coordinators."""
    cluster = Cluster(replace(with_coordinators(RULES, 2), start_members=3), MEMBERS[:3])
    slow = cluster.voters[2]
    while len(cluster.certified) < 2:
        keep_talking(cluster, cluster.coordinators[0], cluster.voters, 1)
    cluster.cut.add(frozenset((0, 1)))
    coordinator = cluster.coordinators[0]
    for _ in range(400):
        keep_talking(cluster, coordinator, cluster.voters[:2], 1)
        if (known := coordinator.state.round) is None or known.proposal is None or known.certified:
            cluster.talk(slow, coordinator)
        coordinator.send(Seen(slow.node))
    last = max(cluster.certified)
    keep_talking(cluster, coordinator, cluster.voters, 200)
    assert max(cluster.certified) > last, coordinator.state.note


def training(cluster: Cluster) -> Plan:
    """Let the first coordinator lead until its members have begun a planned round; return its plan."""
    first = cluster.coordinators[0]
    while len(cluster.certified) < 2:
        keep_talking(cluster, first, cluster.voters, 1)
    for turn in range(400):
        cluster.talk(cluster.voters[turn % len(cluster.voters)], first)
        known = first.state.round
        if known is not None and known.stage is Stage.COMMITTING and not known.commitments:
            return known.plan
    raise AssertionError("no round was planned")


def take_over(cluster: Cluster, plan: Plan, voters: list[Voter] | None = None) -> Coordinator:
    """Replace the first coordinator, whose members train for ``plan``, by the second; ``voters`` follow it."""
    second = cluster.coordinators[1]
    cluster.coordinators[0].crash()
    for voter in cluster.voters:
        voter.plan = plan
    second.later = max(voter.acceptor.term for voter in cluster.voters)
    second.begin()
    for voter in voters or cluster.voters:
        cluster.talk(voter, second)
    return second


def a_leader_dies_while_its_members_train() -> None:
    """Members have not voted in a term as late as the plan's, but their training must not be lost."""
    cluster = Cluster(with_coordinators(RULES, 2), MEMBERS)
    plan = training(cluster)
    second = take_over(cluster, plan)
    keep_talking(cluster, second, cluster.voters, 20)
    assert cluster.certified[plan.round].plan == plan


def one_member_finds_the_new_leader_late() -> None:
    """The three others are a quorum and have finished; the fourth must not be excluded for being a second late."""
    cluster = Cluster(with_coordinators(RULES, 2), MEMBERS)
    plan = training(cluster)
    second = take_over(cluster, plan, cluster.voters[:3])
    keep_talking(cluster, second, cluster.voters[:3], 3)
    keep_talking(cluster, second, cluster.voters, 20)
    assert len(cluster.certified[plan.round].accepted) == 4


def a_member_sends_a_plan_with_a_huge_term() -> None:
    cluster = Cluster(with_coordinators(RULES, 2), MEMBERS)
    plan = training(cluster)
    second = take_over(cluster, msgspec.structs.replace(plan, term=2**61))
    keep_talking(cluster, second, cluster.voters, 20)
    assert plan.round in cluster.certified
    assert second.state.term < 1000


def a_member_sends_a_plan_with_more_than_h_steps() -> None:
    """A plan has no signature. No member would vote for its record, so the new leader plans the round itself."""
    cluster = Cluster(with_coordinators(RULES, 2), MEMBERS)
    plan = training(cluster)
    first, *others = plan.members
    more = msgspec.structs.replace(first, inner_steps=RULES.inner_steps + 1)
    second = take_over(cluster, msgspec.structs.replace(plan, members=(more, *others)))
    assert second.state.round is not None
    assert all(member.inner_steps <= RULES.inner_steps for member in second.state.round.plan.members)
    keep_talking(cluster, second, cluster.voters, 20)
    assert plan.round in cluster.certified


CASES = (
    the_leader_dies_and_its_voters_restart,
    two_leaders_with_two_members_each,
    the_voters_of_a_sealed_record_leave_for_good,
    a_slow_voter_while_the_other_coordinator_is_away,
    a_leader_dies_while_its_members_train,
    one_member_finds_the_new_leader_late,
    a_member_sends_a_plan_with_a_huge_term,
    a_member_sends_a_plan_with_more_than_h_steps,
)


@pytest.mark.parametrize("case", CASES)
def test_a_likely_failure_is_survived(case: Callable[[], None]) -> None:
    case()


def patched(**places: object) -> Callable[[], ExitStack]:
    """Return a context manager that patches the names in ``places`` (``__`` stands for a dot)."""

    def enter() -> ExitStack:
        stack = ExitStack()
        for place, value in places.items():
            stack.enter_context(mock.patch(place.replace("__", "."), value))
        return stack

    return enter


MODULE = "tests__protocol__many_leaders__"
BUGS: dict[str, tuple[Callable[[], None], Callable[[], ExitStack]]] = {
    "forgetting the promise on restart": (CASES[0], patched(**{MODULE + "Voter.crash": forgetting_the_promise})),
    "voting before persisting": (CASES[0], patched(**{MODULE + "Voter.crash": losing_the_vote})),
    "a leader that does not ask what was voted for": (
        CASES[0],
        patched(
            psyche__protocol__rounds__resume_round=lambda rules, state, ready, now: (replace(state, resumed=True), [])
        ),
    ),
    "a quorum of one half": (
        CASES[1],
        patched(psyche__protocol__standing__quorum=half_is_enough),
    ),
    "signing a reconfiguration after a seal": (
        CASES[2],
        patched(
            **{
                MODULE + "sign_reconfiguration": lambda signed_state, *_: signed_state,
                MODULE + "seal": lambda signed_state, *_: signed_state,
            }
        ),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str) -> None:
    case, planted = BUGS[bug]
    with planted(), pytest.raises(AssertionError, match="certified twice"):
        case()
