"""Rates of lines and sizes of disks, as people write them."""

import pytest

from psyche.rates import bits_per_second, bytes_per_second


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
def test_rates_are_read_in_the_words_of_tc_and_of_providers(text: str, bits: int) -> None:
    assert bits_per_second(text) == bits
    assert bytes_per_second(text) == bits / 8


@pytest.mark.parametrize("text", ["", "100", "0mbit", "100mb", "-1mbit", "fast", "1e3bit", "20 mph", "0.1bit"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a rate such as"):
        bits_per_second(text)


def test_no_limit_stays_none() -> None:
    assert bytes_per_second(None) is None
