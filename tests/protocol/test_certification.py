"""No round is certified twice, whoever crashes, is cut off, comes back or leads beside another; and the run goes on.

The inspector sits in ``Parliament.sealed``. That it sees what it should is shown by bugs that are planted.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.protocol import proposals
from psyche.protocol.acceptor import Acceptor
from tests.protocol.parliament import Parliament, Voter, with_coordinators
from tests.protocol.players import RULES, nodes

COUNTS = st.sampled_from([1, 2, 2, 3])
VERBS = (
    *(["talk"] * 16 + ["session"] * 16 + ["wait"] * 3 + ["up"] * 6),
    *("long", "begin", "begin", "stop", "down", "down", "cut", "heal"),
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


def play(count: int, steps: list[tuple[str, int, int]]) -> Parliament:
    world = Parliament(with_coordinators(RULES, count), MEMBERS)
    for verb, who, which in steps:
        happen(world, verb, who, which)
    return world


@settings(max_examples=250, deadline=None)
@given(count=COUNTS, steps=STEPS)
def test_no_round_is_certified_twice(count: int, steps: list[tuple[str, int, int]]) -> None:
    play(count, steps)


@settings(max_examples=60, deadline=None)
@given(count=COUNTS, steps=STEPS, which=st.integers(0, 2))
def test_once_all_talk_to_one_coordinator_the_run_goes_on(
    count: int, steps: list[tuple[str, int, int]], which: int
) -> None:
    world = play(count, steps)
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
        certified += len(play(seed % 3 + 1, schedule(seed)).certified)
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


BUGS: dict[str, Callable[[], object]] = {
    "forgetting the promise on restart": lambda: mock.patch.object(Voter, "crash", forgetting_the_promise),
    "voting before persisting": lambda: mock.patch.object(Voter, "crash", losing_the_vote),
    "a quorum of one half": lambda: mock.patch.object(proposals, "quorum", half_is_enough),
    "signing a roster after a seal": lambda: mock.patch("tests.protocol.parliament.sign_roster", lambda oath, *_: oath),
    "a leader that does not ask what was voted for": lambda: mock.patch(
        "psyche.protocol.rounds.take_up", lambda rules, state, ready, now: (replace(state, taken_up=True), [])
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str) -> None:
    def search() -> None:
        for seed in range(20_000):
            play(seed % 3 + 1, schedule(seed))

    with BUGS[bug](), pytest.raises(AssertionError, match="certified twice"):  # type: ignore[attr-defined]
        search()
