"""No round is certified twice, whoever crashes, is cut off, comes back or leads beside another; and the run goes on.

The inspector sits in ``Parliament.sealed``. That it sees what it should is shown by bugs that are planted.
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
from tests.protocol.many_leaders import Parliament, Seat, Voter, with_coordinators
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


def happen(world: Parliament, verb: str, who: int, which: int) -> None:
    seat = world.seats[which % len(world.seats)]
    voter = world.voters[who % len(world.voters)]
    match verb:
        case "talk":
            world.talk(voter, seat)
        case "session":  # most of them, for as many turns as a round takes, or fewer
            for _ in range(1 + who % 8):
                for place, one in enumerate(world.voters):
                    if place != who // 4 or who % 2:
                        world.talk(one, seat)
        case "half":
            for _ in range(6):
                for one in world.voters[2 * (who % 2) :][:2]:
                    world.talk(one, seat)
        case "blackout":
            for place, one in enumerate(world.voters):
                if place != who % 4:
                    one.crash()
        case "wait":
            world.wait(1.0 + who)
        case "long":
            world.wait(RULES.round_bounds[1] + who)
        case "begin":
            seat.begin()
        case "stop":
            seat.crash()
        case "down":
            voter.crash()
        case "up":
            voter.up = True
        case "cut" if len(world.seats) > 1:
            world.cut.add(frozenset((which % len(world.seats), (which + 1) % len(world.seats))))
        case "heal":
            world.cut.clear()


def play(count: int, probation: int, steps: list[tuple[str, int, int]]) -> Parliament:
    world = Parliament(with_coordinators(RULES, count, probation), MEMBERS)
    for verb, who, which in steps:
        happen(world, verb, who, which)
    return world


@settings(max_examples=150, deadline=None)
@given(count=COUNTS, probation=PROBATIONS, steps=STEPS)
def test_no_round_is_certified_twice(count: int, probation: int, steps: list[tuple[str, int, int]]) -> None:
    play(count, probation, steps)


@settings(max_examples=25, deadline=None)
@given(count=COUNTS, probation=PROBATIONS, steps=STEPS, which=st.integers(0, 2))
def test_once_all_talk_to_one_coordinator_the_run_goes_on(
    count: int, probation: int, steps: list[tuple[str, int, int]], which: int
) -> None:
    world = play(count, probation, steps)
    seat = world.seats[which % count]
    for one in world.seats:
        one.leads = False
    seat.begin()
    before = max(world.certified, default=0)
    world.calm(seat, 700)
    assert max(world.certified, default=0) > before + 1, seat.state.note


def schedule(seed: int, length: int = 160) -> list[tuple[str, int, int]]:
    dice = random.Random(seed)
    return [(dice.choice(VERBS), dice.randrange(16), dice.randrange(3)) for _ in range(length)]


@pytest.mark.slow
def test_twenty_thousand_schedules() -> None:
    certified = 0
    for seed in range(20_000):
        certified += len(play(seed % 3 + 1, 2 * (seed % 2), schedule(seed)).certified)
    assert certified > 20_000, "the schedules get somewhere"


# ------------------------------------------------------------------------------------ planted bugs


def forgetting_the_promise(self: Voter) -> None:
    self.plan, self.shown, self.opened, self.up = None, {}, {}, False
    self.acceptor, self.accepted = Acceptor(), None


def losing_the_vote(self: Voter) -> None:
    """It was said before it was on disk."""
    self.plan, self.shown, self.opened, self.up = None, {}, {}, False
    self.acceptor, self.accepted = replace(self.acceptor, term=0, record=b""), None


def half_is_enough(yes: int, total: int) -> bool:
    return total > 0 and 2 * yes >= total


def certified_unheard(count: int) -> Parliament:
    """The third of four members has just voted, and nobody has heard yet that the round is certified."""
    world = Parliament(with_coordinators(RULES, count), MEMBERS)
    for _ in range(40):
        if world.certified:  # the other coordinator was asked for the first roster, and hears of nothing after it
            world.cut.add(frozenset((0, 1)))
        for voter in world.voters[:3]:
            world.talk(voter, world.seats[0])
            if 2 in world.certified:
                return world
        if max(world.certified, default=0) == world.voters[3].chain.rounds or world.voters[3].chain.rounds == 0:
            world.talk(world.voters[3], world.seats[0])
    raise AssertionError("nothing was certified")


def go_on(world: Parliament, seat: Seat, voters: list[Voter], turns: int = 40) -> None:
    for _ in range(turns):
        for voter in voters:
            voter.up = True
            world.talk(voter, seat)
        if seat.later > seat.state.term:
            seat.begin()
        world.wait(1.0)


def the_leader_dies_and_its_voters_start_again() -> None:
    world = certified_unheard(2)
    world.seats[0].crash()
    a, b, c, d = world.voters
    for voter in (a, b, c):
        voter.crash()
    world.seats[1].begin()
    go_on(world, world.seats[1], [a, b, d])
    assert max(world.certified) > 2


def two_leaders_with_two_members_each() -> None:
    world = Parliament(with_coordinators(RULES, 2), MEMBERS)
    go_on(world, world.seats[0], world.voters, 3)
    world.seats[1].later = world.seats[0].state.term
    while not world.certified:
        go_on(world, world.seats[0], world.voters, 1)
    go_on(world, world.seats[0], world.voters, 2)
    world.seats[1].begin()
    world.cut.add(frozenset((0, 1)))
    for _ in range(20):
        go_on(world, world.seats[0], world.voters[:2], 1)
        go_on(world, world.seats[1], world.voters[2:], 1)


def the_voters_leave_for_good_with_a_sealed_record() -> None:
    world = certified_unheard(1)
    for voter in world.voters[:3]:
        voter.crash()
    world.seats[0].crash()
    world.seats[0].begin()
    go_on(world, world.seats[0], world.voters[3:], 400)


def a_slow_voter_while_the_other_coordinator_is_away() -> None:
    """All three votes are needed. Without the third a roster is, which takes both coordinators."""
    world = Parliament(replace(with_coordinators(RULES, 2), start_members=3), MEMBERS[:3])
    slow = world.voters[2]
    while len(world.certified) < 2:
        go_on(world, world.seats[0], world.voters, 1)
    world.cut.add(frozenset((0, 1)))
    seat = world.seats[0]
    for _ in range(400):
        go_on(world, seat, world.voters[:2], 1)
        if (known := seat.state.round) is None or known.proposal is None or known.certified:
            world.talk(slow, seat)
        seat.send(Seen(slow.node))
    last = max(world.certified)
    go_on(world, seat, world.voters, 200)
    assert max(world.certified) > last, seat.state.note


def training(world: Parliament) -> Plan:
    """The first coordinator leads, and its members begin a round that it has planned; its plan."""
    first = world.seats[0]
    while len(world.certified) < 2:
        go_on(world, first, world.voters, 1)
    for turn in range(400):
        world.talk(world.voters[turn % len(world.voters)], first)
        known = first.state.round
        if known is not None and known.stage is Stage.COMMITTING and not known.commitments:
            return known.plan
    raise AssertionError("no round was planned")


def taken_over(world: Parliament, plan: Plan, voters: list[Voter] | None = None) -> Seat:
    """The second coordinator leads in place of the first, whose members train for ``plan``; ``voters`` know it."""
    second = world.seats[1]
    world.seats[0].crash()
    for voter in world.voters:
        voter.plan = plan
    second.later = max(voter.acceptor.term for voter in world.voters)
    second.begin()
    for voter in voters or world.voters:
        world.talk(voter, second)
    return second


def a_leader_dies_while_its_members_train() -> None:
    """They have voted in no term as late as that of the plan; what they are doing is not thrown away."""
    world = Parliament(with_coordinators(RULES, 2), MEMBERS)
    plan = training(world)
    second = taken_over(world, plan)
    go_on(world, second, world.voters, 20)
    assert world.certified[plan.round].plan == plan


def one_of_the_members_finds_the_new_leader_last() -> None:
    """The three others are a quorum, and have done their work; its own is not left out for a second's delay."""
    world = Parliament(with_coordinators(RULES, 2), MEMBERS)
    plan = training(world)
    second = taken_over(world, plan, world.voters[:3])
    go_on(world, second, world.voters[:3], 3)
    go_on(world, second, world.voters, 20)
    assert len(world.certified[plan.round].accepted) == 4


def a_member_shows_a_plan_of_the_far_future() -> None:
    world = Parliament(with_coordinators(RULES, 2), MEMBERS)
    plan = training(world)
    second = taken_over(world, msgspec.structs.replace(plan, term=2**61))
    go_on(world, second, world.voters, 20)
    assert plan.round in world.certified
    assert second.state.term < 1000


def a_member_shows_a_plan_that_gives_it_more_than_h() -> None:
    """A plan carries no signature. Nobody would vote for the record, so the new leader makes a plan of its own."""
    world = Parliament(with_coordinators(RULES, 2), MEMBERS)
    plan = training(world)
    first, *others = plan.members
    more = msgspec.structs.replace(first, inner_steps=RULES.inner_steps + 1)
    second = taken_over(world, msgspec.structs.replace(plan, members=(more, *others)))
    assert second.state.round is not None
    assert all(member.inner_steps <= RULES.inner_steps for member in second.state.round.plan.members)
    go_on(world, second, world.voters, 20)
    assert plan.round in world.certified


CASES = (
    the_leader_dies_and_its_voters_start_again,
    two_leaders_with_two_members_each,
    the_voters_leave_for_good_with_a_sealed_record,
    a_slow_voter_while_the_other_coordinator_is_away,
    a_leader_dies_while_its_members_train,
    one_of_the_members_finds_the_new_leader_last,
    a_member_shows_a_plan_of_the_far_future,
    a_member_shows_a_plan_that_gives_it_more_than_h,
)


@pytest.mark.parametrize("case", CASES)
def test_what_is_most_likely_to_go_wrong_does_not(case: Callable[[], None]) -> None:
    case()


def patched(**places: object) -> Callable[[], ExitStack]:
    """A context in which the names at ``places`` (with __ for .) are something else."""

    def enter() -> ExitStack:
        stack = ExitStack()
        for place, value in places.items():
            stack.enter_context(mock.patch(place.replace("__", "."), value))
        return stack

    return enter


PARLIAMENT = "tests__protocol__many_leaders__"
BUGS: dict[str, tuple[Callable[[], None], Callable[[], ExitStack]]] = {
    "forgetting the promise on restart": (CASES[0], patched(**{PARLIAMENT + "Voter.crash": forgetting_the_promise})),
    "voting before persisting": (CASES[0], patched(**{PARLIAMENT + "Voter.crash": losing_the_vote})),
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
    "signing a roster after a seal": (
        CASES[2],
        patched(
            **{
                PARLIAMENT + "sign_reconfiguration": lambda signed_state, *_: signed_state,
                PARLIAMENT + "seal": lambda signed_state, *_: signed_state,
            }
        ),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str) -> None:
    case, planted = BUGS[bug]
    with planted(), pytest.raises(AssertionError, match="certified twice"):
        case()
