"""torch.compile where it pays: decided by measurement, remembered, and never a reason not to train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psyche.config import Inner, Node
from psyche.training import compiling
from psyche.training.compiling import Measured
from psyche.training.torch_engine import Piece, TorchEngine
from tests.training.tiny_models import SPLIT, steps, tiny

torch.set_num_threads(1)
INNER = Inner(lr=1e-2, batch_size=4, warmup_steps=0)


def engine(**node: object) -> TorchEngine:
    return TorchEngine(tiny(), INNER, Node(device="cpu", **node))


def tuned(one: TorchEngine, passes: int, memory: Path) -> str:
    """What it says in the end; nothing where it was not tried."""
    said: list[str] = []
    one.tune(SPLIT.batch(range(4)), passes, memory, said.append)
    return said[-1] if said else ""


@given(eager=st.floats(0, 10), compiled=st.floats(0, 10), compiling=st.floats(0, 1000), passes=st.integers(0, 10**6))
def test_it_pays_where_all_passes_save_more_than_compiling_takes(
    eager: float, compiled: float, compiling: float, passes: int
) -> None:
    one = Measured(eager, compiled, compiling)
    assert one.pays(passes) == (passes * (eager - compiled) > compiling)
    assert not Measured(eager, compiled, compiling, "no compiler").pays(passes)


def test_short_trainings_are_not_worth_a_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("it compiles"))
    assert not tuned(engine(), 100, tmp_path)
    assert not tuned(engine(compile="off"), 10**9, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("speeds", "expected"), [((2.0, 1.0), "the model is compiled: a"), ((1.0, 2.0), "the model is not compiled: a")]
)
def test_long_ones_are_decided_by_what_was_measured_once(
    speeds: tuple[float, float], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilations = []

    def pretend(model: torch.nn.Module, dynamic: bool) -> Callable[..., object]:
        compilations.append(model)
        return model.forward

    measured = []

    def measure(*_: object) -> Measured:
        measured.append(1)
        return Measured(*speeds, compiling=60.0)

    monkeypatch.setattr(torch, "compile", pretend)
    monkeypatch.setattr(compiling, "_measure", measure)
    for _ in range(2):
        said = tuned(engine(), 10**9, tmp_path)
        assert said.startswith(expected)
    assert len(measured) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_compiled_is_trained_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nanywhere")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    one, plain = engine(compile="on"), engine()
    assert tuned(one, 10**9, tmp_path) == "the model is not compiled: no C++ compiler anywhere"
    assert steps(one, 2) == steps(plain, 2)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_memory_that_runs_out_meanwhile_ends_the_attempt_and_nothing_else(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the very first pass, the first one compiled, and a later one; the next time there may be enough."""

    class Narrow(TorchEngine):
        passes = -3  # two measure what a sequence keeps; one is a step

        def _loss(self, forward: Callable[..., object], piece: Piece) -> torch.Tensor:
            self.passes += 1
            if self.passes > after:
                raise torch.OutOfMemoryError("no more")
            return super()._loss(forward, piece)

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model.forward)
    monkeypatch.setattr(compiling, "WORTH_TRYING", 0.0)
    one, plain = Narrow(tiny(), INNER, Node(device="cpu")), engine()
    first = steps(one, 1)
    assert tuned(one, 10**9, tmp_path) == "the model is not compiled: memory ran out while its speed was measured"
    assert not list(tmp_path.iterdir())
    one.passes = -100
    assert [*first, *steps(one, 2, start=1)] == steps(plain, 3)


@pytest.mark.slow
def test_a_compiled_model_takes_the_same_steps(tmp_path: Path) -> None:
    one, plain = engine(compile="on"), engine()
    said = tuned(one, 100, tmp_path)
    assert said.startswith("the model is compiled: "), said
    assert one.evaluate(SPLIT.batch(range(4))) == plain.evaluate(SPLIT.batch(range(4))), "measuring changed something"
    assert steps(one, 6) == pytest.approx(steps(plain, 6), rel=1e-4)
    assert one.evaluate(SPLIT.batch(range(5))) == pytest.approx(plain.evaluate(SPLIT.batch(range(5))), rel=1e-4)
