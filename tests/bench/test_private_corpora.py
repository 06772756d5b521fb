"""The federated section of the convergence bench, with real runs of a tiny model."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from psyche.bench.convergence.private_corpora import DELTA, Federated, FederatedRow, federated_section
from psyche.bench.convergence.trial import CENTRE, PrivateCorpora, Setting, UnlimitedBudget
from psyche.config import Outer
from psyche.data.prepare import prepare
from psyche.federated.privacy_budget import noise_for


@pytest.fixture(scope="module")
def section(setting: Setting) -> Federated:
    outer = Outer(lr=0.7, momentum=0.5)
    return Federated(setting, 8, 4, outer, seeds=(0,), clip=0.1, noise_multipliers=(0.001, 2.0))


@pytest.fixture(scope="module")
def rows(section: Federated) -> list[FederatedRow]:
    return section.measure()


def test_every_planned_row_is_measured_in_order(section: Federated, rows: list[FederatedRow]) -> None:
    assert [row.name for row in rows] == [item.name for item in section.items()]
    assert [row.data for row in rows] == ["pooled", "own", "own, clipped", *["own, clipped, noised"] * 2]
    assert len({row.name for row in rows}) == len({row.heldout_loss for row in rows}) == 5
    assert all(3.0 < row.heldout_loss < 6.0 for row in rows), "no noise, however large, ruins the model"
    assert [row.epsilon is None for row in rows] == [True, True, True, False, False]


def test_corpora_are_apart_and_their_order_is_that_of_the_seed(section: Federated) -> None:
    store = prepare(section.setting.data, section.setting.cache, vocab_limit=300)
    trial = replace(next(section.items()).trial, private=PrivateCorpora())
    length = len(store.train) // CENTRE
    for number in range(CENTRE):
        own = store.train.batch(range(number * length, (number + 1) * length))
        first, again = (UnlimitedBudget(trial, store, number).batch(length) for _ in range(2))
        assert np.array_equal(first, again)
        assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, own.tolist()))


def test_the_most_noise_is_that_of_a_budget_people_mean() -> None:
    section = federated_section()
    rounds = section.steps // section.inner_steps
    assert noise_for(8.0, DELTA, rounds) == pytest.approx(max(section.noise_multipliers), rel=0.1)


def test_the_table_says_what_each_row_cost(section: Federated, rows: list[FederatedRow]) -> None:
    console = Console(file=io.StringIO(), width=132)
    section.show(rows, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("own, clipped, noised") == 2
    assert rows[0].against_pooled_percent == 0.0
    assert DELTA == 1e-6
