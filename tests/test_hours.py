"""Hours of the day and sizes of memory, as people write them."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche.hours import Hours


def at(text: str) -> datetime:
    return datetime.strptime(f"2026-03-04 {text}", "%Y-%m-%d %H:%M")


@pytest.mark.parametrize(
    ("hours", "within", "without"),
    [
        ("22:00-07:00", ("22:00", "23:59", "00:00", "06:59"), ("07:00", "12:00", "21:59")),
        ("9:30-17:00", ("09:30", "16:59"), ("09:29", "17:00", "00:00")),
        ("12:00-13:00, 22:00-24:00", ("12:30", "22:00", "23:59"), ("13:00", "00:00", "21:00")),
        ("00:00-24:00", (), ()),
    ],
)
def test_hours_have_their_beginning_and_not_their_end(
    hours: str, within: tuple[str, ...], without: tuple[str, ...]
) -> None:
    if not within:
        with pytest.raises(ValueError, match="are no hours"):
            Hours.parse(hours)
        return
    parsed = Hours.parse(hours)
    assert all(at(moment) in parsed for moment in within)
    assert not any(at(moment) in parsed for moment in without)


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 1439))
def test_the_next_opening_is_when_they_begin(begin: int, end: int, now: int) -> None:
    if begin == end:
        return
    hours = Hours.parse(f"{begin // 60}:{begin % 60:02}-{end // 60}:{end % 60:02}")
    moment = at("00:00") + timedelta(minutes=now)
    opening = at(hours.next_opening(moment))
    assert opening in hours
    assert opening - timedelta(minutes=1) not in hours


@pytest.mark.parametrize("text", ["", "22-7", "22:00", "25:00-07:00", "22:60-07:00", "22:00-22:00", "10:00-9:0", "-"])
def test_what_are_no_hours_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="are no hours such as"):
        Hours.parse(text)
