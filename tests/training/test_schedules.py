"""The inner learning rate at the corners of every schedule."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
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


MEMBERS = st.builds(
    Inner,
    lr=st.floats(1e-6, 1.0),
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    warmup_steps=st.integers(0, 50),
    fresh_warmup_steps=st.integers(0, 60),
)


@given(inner=MEMBERS, total=st.integers(1, 200), step=st.integers(0, 200))
def test_who_is_there_from_the_beginning_has_the_runs_schedule_to_the_bit(inner: Inner, total: int, step: int) -> None:
    assert learning_rate(inner, step, total, step) == learning_rate(inner, step, total)


@given(inner=MEMBERS, total=st.integers(1, 200), step=st.integers(0, 200), taken=st.integers(0, 200))
def test_a_fresh_optimizer_is_never_faster_than_the_schedule_and_soon_as_fast(
    inner: Inner, total: int, step: int, taken: int
) -> None:
    rate, scheduled = learning_rate(inner, step, total, taken), learning_rate(inner, step, total)
    assert 0 < rate <= scheduled
    if taken >= inner.fresh_warmup_steps or not inner.warmup_steps:
        assert rate == scheduled


def test_the_warm_up_of_a_fresh_optimizer_is_a_share_of_what_the_schedule_says_then() -> None:
    inner = Inner(lr=1.0, warmup_steps=10, fresh_warmup_steps=4, schedule="cosine", final_lr=0.1)
    scheduled = [learning_rate(inner, step, 100) for step in range(80, 86)]
    rates = [learning_rate(inner, 80 + taken, 100, taken) for taken in range(6)]
    assert [a / b for a, b in zip(rates, scheduled, strict=True)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_twenty_steps_keep_the_moves_of_noise_at_what_they_are_later() -> None:
    """What the default rests on: AdamW on pure noise, its first moves against those it makes in the long run."""
    inner = Inner(lr=1.0, warmup_steps=100, schedule="constant", betas=(0.9, 0.99))
    parameter = torch.zeros(20_000, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=inner.betas, weight_decay=0.0)
    noise, moves = torch.Generator().manual_seed(1), []
    for taken in range(300):
        optimizer.param_groups[0]["lr"] = learning_rate(inner, 5000 + taken, 10_000, taken)
        before = parameter.detach().clone()
        parameter.grad = torch.randn(20_000, generator=noise)
        optimizer.step()
        moves.append(float((parameter.detach() - before).square().mean().sqrt()))
    later = sum(moves[200:]) / 100
    assert later == pytest.approx((0.1 / 1.9) ** 0.5, rel=0.05)
    assert max(moves[:30]) < 1.17 * later
    assert inner.lr > 4 * later, "the first move is ±lr in every coordinate"


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
