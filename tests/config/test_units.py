"""Rates, sizes and hours as people write them."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche.config.units import Hours, bits_per_second, byte_count, bytes_per_second


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("100mbit", 10**8),
        ("1.5mbit", 1_500_000),
        ("800kbit", 800_000),
        ("1 Gbit/s", 10**9),
        ("9bit", 9),
        ("2.5MB", 20_000_000),
        (" 20Mbit/s ", 2 * 10**7),
    ],
)
def test_rates_are_read_as_tc_and_providers_write_them(text: str, bits: int) -> None:
    assert bits_per_second(text) == bits
    assert bytes_per_second(text) == bits / 8


@pytest.mark.parametrize("text", ["", "100", "0mbit", "100mb", "-1mbit", "fast", "1e3bit", "20 mph", "0.1bit"])
def test_a_wrong_rate_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="is not a rate such as"):
        bits_per_second(text)


def test_no_limit_stays_none() -> None:
    assert bytes_per_second(None) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6gb", 6 * 10**9),
        ("6GiB", 6 * 2**30),
        ("800 MB", 8 * 10**8),
        ("1.5gib", 3 * 2**29),
        ("512b", 512),
        ("1.5 TB", 15 * 10**11),
    ],
)
def test_sizes_are_read_with_decimal_and_binary_prefixes(text: str, size: int) -> None:
    assert byte_count(text) == size


@pytest.mark.parametrize("text", ["", "6", "6g", "0gb", "-1gb", "much", "1e3gb", "6gbit"])
def test_a_wrong_size_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as"):
        byte_count(text)


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
def test_ranges_of_hours_are_half_open(hours: str, within: tuple[str, ...], without: tuple[str, ...]) -> None:
    if not within:
        with pytest.raises(ValueError, match="is not a range of hours"):
            Hours.parse(hours)
        return
    parsed = Hours.parse(hours)
    assert all(at(moment) in parsed for moment in within)
    assert not any(at(moment) in parsed for moment in without)


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 1439))
def test_the_next_opening_is_the_beginning_of_a_range(begin: int, end: int, now: int) -> None:
    if begin == end:
        return
    hours = Hours.parse(f"{begin // 60}:{begin % 60:02}-{end // 60}:{end % 60:02}")
    moment = at("00:00") + timedelta(minutes=now)
    opening = at(hours.next_opening(moment))
    assert opening in hours
    assert opening - timedelta(minutes=1) not in hours


@pytest.mark.parametrize("text", ["", "22-7", "22:00", "25:00-07:00", "22:60-07:00", "22:00-22:00", "10:00-9:0", "-"])
def test_wrong_hours_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="is not a range of hours"):
        Hours.parse(text)
