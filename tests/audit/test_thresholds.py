"""Thresholds: the stated coverage of unseen errors holds, and a margin separates honest errors from frauds."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche.audit.thresholds import CONFIDENCE, MARGIN, covered, rounded, thresholds

ERRORS = st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1.0)), min_size=4, max_size=9)


@pytest.mark.parametrize("count", [8, 59, 299])
def test_the_largest_sample_exceeds_the_stated_share_of_the_population(count: int) -> None:
    """59 samples are the fewest for 95 %, and 299 for 99 % (Wilks 1941)."""
    assert covered(59) == pytest.approx(0.95, abs=5e-4)
    assert covered(299) == pytest.approx(0.99, abs=5e-4)
    random, share = Random(1), covered(count)
    held = sum(max(random.random() for _ in range(count)) >= share for _ in range(2000))
    assert held >= 2000 * (CONFIDENCE - 0.02)


@given(st.lists(ERRORS, min_size=1, max_size=4), st.lists(ERRORS, min_size=1, max_size=3))
def test_honest_errors_are_well_below_the_fail_threshold(honest: list[list[float]], hostile: list[list[float]]) -> None:
    pairs = {f"{number}": errors for number, errors in enumerate(honest)}
    found = thresholds(pairs, {"fraud": hostile}, [])
    largest = max(max(errors) for errors in honest)
    assert largest <= found.honest
    assert found.pass_error < found.fail_error
    assert MARGIN * largest <= found.fail_error
    assert largest <= found.pass_error
    assert found.hostile["fraud"] == min(sum(e >= found.fail_error for e in errors) / len(errors) for errors in hostile)


def test_thresholds_lie_between_honest_errors_and_frauds() -> None:
    found = thresholds(
        {"a | b": [0.004, 0.0041, 0.0039, 0.004], "b | a": [0.0] * 4},
        {"tenth": [[0.14, 0.141, 0.139, 0.01]], "step": [[0.004, 0.021, 0.003, 0.002]]},
        ["step"],
    )
    assert 0.0041 < found.pass_error < found.fail_error < 0.139
    assert found.hostile == {"tenth": 0.75, "step": 0.0 if found.fail_error > 0.021 else 0.25}
    assert found.missed == ("step",)


def test_frauds_no_larger_than_the_noise_are_reported_as_missed() -> None:
    found = thresholds({"a | b": [0.1, 0.2, 0.3, 0.15]}, {"tenth": [[0.14, 0.15, 0.13, 0.12]]}, [])
    assert found.missed == ("tenth",)
    with pytest.raises(ValueError, match="thresholds need at least 4"):
        thresholds({"a | b": [0.1] * 3}, {"tenth": [[0.14] * 3]}, [])


def test_rounding_goes_up_by_default_and_down_on_request() -> None:
    assert rounded(0.0123) == 0.013
    assert rounded(0.0129, down=True) == 0.012
