"""Deadlines that adapt to the observed durations of rounds and exchanges."""

from __future__ import annotations

from dataclasses import replace

import pytest

from psyche.protocol.pacing import DEADLINE_WINDOW, adaptive, exchange_allowance
from psyche.protocol.round_state import (
    Abandoned,
    Departed,
    Seen,
)
from tests.protocol.one_leader import (
    RULES,
    kinds,
    started,
)


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        ((), 100.0),
        ((30.0,), 30.0),
        ((1.0,), 10.0),
        ((500.0,), 100.0),
        ((20.0, 30.0, 40.0), 80.0),
        ((20.0,) * 20 + (90.0,), 20.0),
    ],
)
def test_a_deadline_is_median_plus_spread_times_mad(observed: tuple[float, ...], expected: float) -> None:
    assert adaptive(observed, least=10.0, most=100.0) == expected


def test_the_exchange_deadline_leaves_slack_even_if_all_exchanges_took_the_same() -> None:
    assert exchange_allowance(replace(RULES, exchange_bounds=(1.0, 600.0)), (12.0,) * 8) == pytest.approx(18.0)


def test_only_recent_observations_count() -> None:
    assert adaptive((90.0,) * 500 + (20.0,) * DEADLINE_WINDOW, least=10.0, most=100.0) == 20.0


def test_the_commit_deadline_follows_the_members() -> None:
    leader, members = started(rounds=99)
    assert leader.state.round.deadline - leader.state.round.opened == 100.0
    for _ in range(3):
        leader.wait(18)
        leader.commit_all(members[:2])
        leader.wait(4)
        leader.commit_all(members[2:])
        leader.exchange(members)
        leader.certify(members)
        leader.attest_all(members)
    # 18, 18, 22, 22, ...: median 20, MAD 2
    assert leader.state.round.deadline - leader.state.round.opened == 30.0
    assert len(leader.state.commit_seconds) == 12


def test_observations_do_not_grow_without_bound() -> None:
    leader, members = started(rounds=40)
    for _ in range(39):
        leader.run_round(members)
    assert len(leader.state.commit_seconds) <= DEADLINE_WINDOW
    assert len(leader.state.exchange_seconds) <= DEADLINE_WINDOW


def test_silence_is_counted_from_the_last_message() -> None:
    leader, members = started()
    leader.wait(14, alive=members[1:])
    leader.send(Seen(members[0]))
    leader.wait(15, alive=members[1:])
    assert members[0] in leader.state.peers
    effects = leader.wait(1, alive=members[1:])
    assert effects == [Departed(members[0], "not heard from for 15 s")]


def test_a_round_without_commitments_keeps_the_observed_exchange_times() -> None:
    """Otherwise a node lost in the next round would be waited for as long as the manifest allows."""
    leader, members = started()
    leader.run_round(members)
    seconds = leader.state.exchange_seconds
    assert seconds
    assert Abandoned in kinds(leader.wait(2 * RULES.round_bounds[1]))
    assert leader.state.exchange_seconds == seconds


def test_a_round_that_is_slow_for_all_members_is_not_restarted() -> None:
    """A machine under load: rounds took 15 s, and after 40 s no member has finished."""
    leader, members = started(rounds=99)
    for _ in range(3):
        leader.wait(15)
        leader.commit_all(members)
        leader.exchange(members)
        leader.certify(members)
        leader.attest_all(members)
    plan = leader.plan
    assert leader.state.round.deadline - leader.state.round.opened == pytest.approx(15.0 * 1.25), (
        "a quarter more than the median"
    )
    assert leader.wait(40) == []
    assert "no member has finished yet" in leader.state.note
    leader.commit_all(members)
    assert leader.plan == plan
    leader.exchange(members)
    leader.certify(members)
    assert len(leader.certified[plan.round].accepted) == len(members)
