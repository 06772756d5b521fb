"""Rates of lines and sizes of disks, as people write them."""

import pytest

from psyche.rates import bits_per_second, byte_count, bytes_per_second


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


@pytest.mark.parametrize(
    ("text", "size"), [("20GB", 20 * 10**9), ("512MiB", 512 << 20), ("1.5 tb", 1_500_000_000_000), ("64b", 64)]
)
def test_sizes_are_decimal_unless_they_say_that_they_are_not(text: str, size: int) -> None:
    assert byte_count(text) == size


@pytest.mark.parametrize("text", ["", "20", "0GB", "20Gbit", "-1GB", "all", "0.1B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as"):
        byte_count(text)
