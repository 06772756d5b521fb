"""How long members are waited for."""

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


def test_exchanges_that_took_the_same_are_no_reason_to_cut_the_next_one_short() -> None:
    assert exchange_allowance(replace(RULES, exchange_bounds=(1.0, 600.0)), (12.0,) * 8) == pytest.approx(18.0)


def test_only_recent_observations_count() -> None:
    assert adaptive((90.0,) * 500 + (20.0,) * DEADLINE_WINDOW, least=10.0, most=100.0) == 20.0


def test_the_commit_deadline_follows_the_members() -> None:
    table, members = started(rounds=99)
    assert table.state.round.deadline - table.state.round.opened == 100.0
    for _ in range(3):
        table.wait(18)
        table.close(members[:2])
        table.wait(4)
        table.close(members[2:])
        table.exchange(members)
        table.certify(members)
        table.settle(members)
    # 18, 18, 22, 22, ...: median 20, MAD 2
    assert table.state.round.deadline - table.state.round.opened == 30.0
    assert len(table.state.commit_seconds) == 12


def test_observations_do_not_grow_without_bound() -> None:
    table, members = started(rounds=40)
    for _ in range(39):
        table.play_round(members)
    assert len(table.state.commit_seconds) <= DEADLINE_WINDOW
    assert len(table.state.exchange_seconds) <= DEADLINE_WINDOW


def test_silence_is_counted_from_the_last_word() -> None:
    table, members = started()
    table.wait(14, alive=members[1:])
    table.send(Seen(members[0]))
    table.wait(15, alive=members[1:])
    assert members[0] in table.state.peers
    effects = table.wait(1, alive=members[1:])
    assert effects == [Departed(members[0], "not heard from for 15 s")]


def test_a_round_nobody_committed_to_forgets_no_exchange() -> None:
    """Else whoever goes away in the next one is waited for as long as the manifest allows at all."""
    table, members = started()
    table.play_round(members)
    seconds = table.state.exchange_seconds
    assert seconds
    assert Abandoned in kinds(table.wait(2 * RULES.round_bounds[1]))
    assert table.state.exchange_seconds == seconds


def test_a_round_that_is_slow_for_all_is_not_thrown_away() -> None:
    """A machine under load: rounds took 15 s, and now nobody has finished one after 40."""
    table, members = started(rounds=99)
    for _ in range(3):
        table.wait(15)
        table.close(members)
        table.exchange(members)
        table.certify(members)
        table.settle(members)
    plan = table.plan
    assert table.state.round.deadline - table.state.round.opened == pytest.approx(15.0 * 1.25), (
        "a quarter more, however regular they were"
    )
    assert table.wait(40) == []
    assert "no member has finished yet" in table.state.note
    table.close(members)
    assert table.plan == plan
    table.exchange(members)
    table.certify(members)
    assert len(table.certified[plan.round].accepted) == len(members)
