"""Bounds from samples hold as often as they say, and thresholds are between honest errors and frauds."""

from __future__ import annotations

from math import exp
from random import Random

import pytest

from psyche.verification.thresholds import (
    CONFIDENCE,
    PASSING,
    lower_bound,
    rounded,
    thresholds,
    tolerance_factor,
    upper_bound,
)


@pytest.mark.parametrize(("count", "expected"), [(5, 5.741), (10, 3.981), (30, 3.064), (100, 2.684)])
def test_factors_are_those_of_the_tables(count: int, expected: float) -> None:
    """One-sided factors for 99 % with 95 % confidence, as tabled (NBS Handbook 91, table A-7); the formula is near."""
    assert tolerance_factor(count, 0.99) == pytest.approx(expected, rel=0.05)


def test_a_bound_holds_as_often_as_it_says() -> None:
    """Log-normal errors: 99 % of them are at exp(μ + 2.326 σ) at most."""
    random, held = Random(1), 0
    for _ in range(1000):
        sample = [exp(random.gauss(-6.0, 0.5)) for _ in range(8)]
        held += upper_bound(sample, PASSING) >= exp(-6.0 + 2.326 * 0.5)
    assert held >= 1000 * (CONFIDENCE - 0.03)


def test_bounds_are_never_inside_of_what_was_measured() -> None:
    sample = [1e-3, 1.1e-3, 0.9e-3, 1e-3]
    assert upper_bound(sample, 0.5) >= max(sample)
    assert lower_bound(sample, 0.5) <= min(sample)
    assert upper_bound([0.0] * 6, 0.99) == 0.0
    with pytest.raises(ValueError, match="fewest"):
        upper_bound([1.0] * 3, 0.99)


def test_thresholds_are_between_honest_errors_and_frauds() -> None:
    found = thresholds(
        {"a | b": [0.004, 0.0041, 0.0039, 0.004], "b | a": [0.0] * 4},
        {"tenth": [[0.14, 0.141, 0.139, 0.14]], "step": [[0.02, 0.021, 0.022, 0.02]]},
        ["step"],
    )
    assert 0.0041 < found.pass_error < found.fail_error < 0.139
    assert found.honest < found.fail_error
    assert found.missed == ("step",)


def test_noise_as_large_as_frauds_is_said_to_be() -> None:
    found = thresholds({"a | b": [0.1, 0.2, 0.3, 0.15]}, {"tenth": [[0.14, 0.15, 0.13, 0.12]]}, [])
    assert found.missed == ("tenth",)
    assert found.pass_error < found.fail_error
    assert found.fail_error >= found.honest, "nobody honest is convicted for it"


def test_rounding_goes_where_it_is_told() -> None:
    assert rounded(0.0123) == 0.013
    assert rounded(0.0129, down=True) == 0.012
