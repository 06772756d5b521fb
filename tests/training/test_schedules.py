"""The inner learning rate at the corners of every schedule."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche.config import Inner
from psyche.training.schedules import learning_rate


def lrs(total: int, **settings: Any) -> list[float]:
    inner = Inner(**({"lr": 1.0, "warmup_steps": 0, "final_lr": 0.1} | settings))
    return [learning_rate(inner, step, total) for step in range(total + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_from_above_zero_to_the_full_rate(schedule: str) -> None:
    assert lrs(100, schedule=schedule, warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine() -> None:
    rates = lrs(100, schedule="cosine")
    assert rates[0] == 1.0
    assert rates[50] == pytest.approx(0.55)
    assert rates[25] == pytest.approx(0.1 + 0.9 * (1 + 0.5**0.5) / 2)
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates))


def test_wsd_is_flat_then_falls_in_a_line() -> None:
    rates = lrs(100, schedule="wsd", decay_fraction=0.2)
    assert set(rates[:81]) == {1.0}
    assert rates[90] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert lrs(100, schedule="wsd", decay_fraction=1.0)[50] == pytest.approx(0.55)


def test_wsd_decays_after_warm_up_even_where_they_would_overlap() -> None:
    rates = lrs(10, schedule="wsd", decay_fraction=0.9, warmup_steps=5)
    assert rates[4] == rates[5] == 1.0
    assert rates[10] == pytest.approx(0.1)


def test_constant() -> None:
    assert set(lrs(10, schedule="constant")) == {1.0}


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_to_nothing_and_to_everything(schedule: str) -> None:
    assert lrs(10, schedule=schedule, final_lr=0.0)[10] == pytest.approx(0.0)
    assert set(lrs(10, schedule=schedule, final_lr=1.0)) == {1.0}


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_run_shorter_than_its_warm_up_only_warms_up(schedule: str) -> None:
    assert lrs(2, schedule=schedule, warmup_steps=4) == [0.25, 0.5, 0.75]


@given(
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    warmup=st.integers(0, 50),
    total=st.integers(1, 60),
    step=st.integers(0, 10_000),
    final=st.floats(0, 1),
    fraction=st.floats(0.01, 1),
)
def test_never_above_the_rate_never_below_the_final_one(
    schedule: str, warmup: int, total: int, step: int, final: float, fraction: float
) -> None:
    inner = Inner(lr=0.5, schedule=schedule, warmup_steps=warmup, final_lr=final, decay_fraction=fraction)
    rate = learning_rate(inner, step, total)
    least = 0.5 / warmup if step < warmup else (0.5 if schedule == "constant" else 0.5 * final)
    assert least * (1 - 1e-9) <= rate <= 0.5 * (1 + 1e-9)
