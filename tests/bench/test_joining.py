"""Plan and rows of the join bench. A whole run is in tests/slow."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from psyche.bench.harness.rows import to_json
from psyche.bench.joining import JoinRow, Newcomer, Plan, planned_join, round_steps, row_of, table_of
from psyche.errors import PsycheError
from psyche.telemetry.events import Downloading, Event, PhaseChanged, Resynchronised, RoundCertified, RunStarted

TRIAL = planned_join(Plan(peers=2, parameters=4_000_000, rate=10**8, inner_steps=10))
BEGAN = 100.0
"""When the newcomer's process was started."""


def at(seconds: float, event: Event) -> Event:
    return msgspec.structs.replace(event, time=seconds)


def certified(round_number: int, seconds: float) -> Event:
    return at(seconds, RoundCertified(round=round_number, accepted=(), excluded=(), state_root="", seconds=0.0))


def events_of(*more: Event) -> list[Event]:
    """By a newcomer that has its state after 8 seconds."""
    return [
        at(BEGAN + 2, PhaseChanged(0, "joining")),
        at(BEGAN + 3, RunStarted("", "join", 1, 2, 9, 10, "int8")),
        at(BEGAN + 3.5, Downloading("the text", 5, 7)),
        at(BEGAN + 4, PhaseChanged(3, "joining")),
        at(BEGAN + 8, Resynchronised(3, "", "the members", (("a", 300), ("b", 100)), 3.0)),
        *more,
    ]


DONORS = [
    [certified(number, when) for number, when in enumerate((60.0, 79.0, 99.0, 120.0, 140.0), 1)],
    [certified(number, when) for number, when in enumerate((60.0, 81.0, 99.0, 122.0, 140.0), 1)],
]
"""Rounds of 19.5 seconds, the mean, before the newcomer comes; of 22 while it joins."""


def test_the_model_is_about_as_large_as_asked_for() -> None:
    for wanted in (4_000_000, 15_000_000, 25_000_000):
        made = planned_join(Plan(parameters=wanted))
        assert made.parameters == pytest.approx(wanted, rel=0.15)
        assert made.state_bytes >= 8 * made.parameters
        assert made.line_seconds == 8 * made.state_bytes / 1e8


def test_a_newcomer_starts_after_a_share_of_the_steps_and_before_the_last() -> None:
    assert [round_steps(TRIAL, share) for share in (0.0, 0.55, 1.0)] == [0, 5, 9]


def test_a_row_is_moments_since_the_start() -> None:
    phases = [at(BEGAN + 8.5, PhaseChanged(4, "warming")), at(BEGAN + 21, PhaseChanged(5, "training"))]
    row = row_of(TRIAL, Newcomer(0.0, BEGAN, 2.5, events_of(*phases)), DONORS)
    assert (row.imported, row.connected, row.asked, row.fetched) == (2, 3, 4, 8)
    assert (row.first_step, row.member) == (8.5, 21)
    assert row.ideal_seconds == 2.5 + TRIAL.line_seconds
    assert row.ratio == 8.5 / row.ideal_seconds
    assert row.line_share == TRIAL.line_seconds / 3
    assert (row.donors, row.least_share, row.text_bytes) == (2, 0.5, 7)
    assert (row.round_before, row.round_during) == (19.5, 22)
    assert row.slowed == pytest.approx(22 / 19.5 - 1)
    assert row.fetching_share == 4 / 22
    assert set(to_json([row])[0]) == set(JoinRow.__struct_fields__)
    screen = io.StringIO()
    Console(file=screen, width=120).print(table_of([row]))
    assert "+12.8" in screen.getvalue()


def test_without_a_warm_up_the_first_step_is_that_of_a_round() -> None:
    row = row_of(TRIAL, Newcomer(0.0, BEGAN, 2.5, events_of(at(BEGAN + 21, PhaseChanged(5, "training")))), DONORS)
    assert row.first_step == row.member == 21


def test_a_newcomer_that_fetched_no_state_is_an_error() -> None:
    with pytest.raises(PsycheError, match="no state"):
        row_of(TRIAL, Newcomer(0.0, BEGAN, 2.5, events_of()[:-1]), DONORS)
