"""The federated section of the convergence bench: real runs, too small to learn anything, where all of it happens."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from psyche.bench import federated
from psyche.bench.federated import DELTA, FederatedScale, Row, federated_scale, measure, show, trials
from psyche.bench.plan import CENTRE
from psyche.bench.trials import Own, Setting, Unpaid
from psyche.config import Outer
from psyche.data.prepare import prepare
from psyche.federated.privacy_budget import noise_for


@pytest.fixture(scope="module")
def scale(setting: Setting) -> FederatedScale:
    outer = Outer(lr=0.7, momentum=0.5)
    return FederatedScale(setting, 8, 4, outer, seeds=(0,), clip=0.1, noise_multipliers=(0.001, 2.0))


@pytest.fixture(scope="module")
def rows(scale: FederatedScale) -> list[Row]:
    return measure(scale)


def test_every_planned_row_is_measured_in_order(scale: FederatedScale, rows: list[Row]) -> None:
    assert [row.name for row in rows] == [trial.label for trial in trials(scale)]
    assert [row.data for row in rows] == ["pooled", "own", "own, clipped", *["own, clipped, noised"] * 2]
    assert len({row.name for row in rows}) == len({row.heldout_loss for row in rows}) == 5
    assert all(3.0 < row.heldout_loss < 6.0 for row in rows), "no noise, however large, ruins the model"
    assert [row.epsilon is None for row in rows] == [True, True, True, False, False]


def test_corpora_are_apart_and_their_order_is_that_of_the_seed(scale: FederatedScale) -> None:
    store = prepare(scale.setting.data, scale.setting.cache, vocab_limit=300)
    trial = replace(next(trials(scale)), own=Own())
    length = len(store.train) // CENTRE
    for number in range(CENTRE):
        own = store.train.batch(range(number * length, (number + 1) * length))
        first, again = (Unpaid(trial, store, number).batch(length) for _ in range(2))
        assert np.array_equal(first, again)
        assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, own.tolist()))


def test_the_most_noise_is_that_of_a_budget_people_mean() -> None:
    scale = federated_scale()
    rounds = scale.steps // scale.inner_steps
    assert noise_for(8.0, DELTA, rounds) == pytest.approx(max(scale.noise_multipliers), rel=0.1)


def test_the_table_says_what_each_row_cost(scale: FederatedScale, rows: list[Row]) -> None:
    console = Console(file=io.StringIO(), width=132)
    show(scale, rows, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("own, clipped, noised") == 2
    assert text.count("%") == len(rows)
    assert federated.DELTA == 1e-6
