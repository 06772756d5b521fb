"""DeepSpeedEngine: several ranks train as one engine does. Ranks are processes on the CPU, over gloo."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from psyche import config
from psyche.config import Inner, Node
from psyche.errors import PsycheError
from psyche.training.engine import Engine
from psyche.training.models import build
from psyche.training.optimizer_state import Moments, pack_state
from psyche.training.torch_engine import TorchEngine
from psyche.training.zero.deepspeed_engine import DeepSpeedEngine
from psyche.training.zero.rank_messages import Fit, Order, OrderDone
from psyche.training.zero.zero_memory import Stage
from tests.processes.swarm import PATIENCE, alive
from tests.training.tiny_models import SETTINGS, Sequences, parameters

torch.set_num_threads(1)
SPEC = config.Model(settings=SETTINGS | {"vocab_size": 4096})
"""One tensor of more than 100,000 elements, which ZeRO 3 keeps cut up, and smaller ones, which it keeps gathered."""
INNER = Inner(lr=1e-2, batch_size=4, weight_decay=0.5)
SPLIT = Sequences(64)
SIZES = (4, 8, 3, 1, 5)
"""Batches, among them some that two ranks cannot share evenly, and one of which one rank gets nothing."""


def ranks(
    directory: Path, stage: Stage, devices: tuple[str, ...] = ("cpu", "cpu"), **changes: object
) -> DeepSpeedEngine:
    given: dict[str, object] = {"offload": False, "precision": "fp32", "micro_batch": 2, "threads": 1} | changes
    return DeepSpeedEngine(SPEC, 0, INNER, devices=devices, stage=stage, directory=directory, **given)  # type: ignore[arg-type]


def alone(**node: object) -> TorchEngine:
    return TorchEngine(build(SPEC, seed=0), INNER, Node(device="cpu", **node))  # type: ignore[arg-type]


@pytest.fixture(
    scope="module", params=[pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeepSpeedEngine]:
    engine = ranks(tmp_path_factory.mktemp("node"), request.param)
    yield engine
    engine.close()


@pytest.fixture
def engine(started: DeepSpeedEngine) -> DeepSpeedEngine:
    """As it was when it was made."""
    started.write(parameters(alone()))
    started.load_state({})
    return started


def train(one: Engine, first: int = 0, last: int = len(SIZES)) -> list[float]:
    return [one.step(SPLIT.batch(range(8 * n, 8 * n + SIZES[n])), 1e-2) for n in range(first, last)]


def assert_close(one: Engine, other: Engine) -> None:
    """Not to the bit: gradients are summed in another order, and AdamW makes much of what is nearly nothing."""
    assert torch.allclose(parameters(one), parameters(other), rtol=0, atol=3e-4)
    mine, theirs = one.state(), other.state()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.shape == theirs[name].shape
        assert torch.allclose(tensor, theirs[name], rtol=1e-3, atol=1e-5), name


def test_it_begins_with_the_runs_initial_parameters(engine: DeepSpeedEngine) -> None:
    assert engine.layout == alone().layout
    assert torch.equal(parameters(engine), parameters(alone()))


def test_several_ranks_train_as_one_device_does(engine: DeepSpeedEngine) -> None:
    """Clipping, weight decay on matrices only, accumulation and batches that do not divide, all in it."""
    other = alone()
    assert train(engine) == pytest.approx(train(other), rel=1e-5)
    assert engine.steps == other.steps == len(SIZES)
    assert_close(engine, other)


def test_evaluate_counts_all_ranks_and_changes_nothing(engine: DeepSpeedEngine) -> None:
    train(engine, 0, 2)
    before, state, other = parameters(engine), engine.state(), alone()
    other.write(before)
    for rows in (8, 5, 1):
        total, predicted = engine.evaluate(SPLIT.batch(range(rows)))
        expected, count = other.evaluate(SPLIT.batch(range(rows)))
        assert (total, predicted) == (pytest.approx(expected, rel=1e-5), count)
    assert torch.equal(parameters(engine), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in engine.state().items())


def test_what_is_written_is_what_trains_next(engine: DeepSpeedEngine) -> None:
    """DeepSpeed's own way to set fp32 parameters leaves the model's copy, and so the next loss, as it was."""
    other = alone()
    train(engine, 0, 2)
    wanted = torch.randn(engine.layout.size, generator=torch.Generator().manual_seed(1)) * 0.02
    engine.write(wanted)
    other.write(wanted)
    batch = SPLIT.batch(range(4))
    assert engine.evaluate(batch)[0] == pytest.approx(other.evaluate(batch)[0], rel=1e-5)
    engine.write(wanted / 2)
    other.write(wanted / 2)
    assert engine.step(batch, 1e-2) == pytest.approx(other.step(batch, 1e-2), rel=1e-5)


def test_write_then_read_is_the_same_to_the_bit(engine: DeepSpeedEngine) -> None:
    wanted = parameters(engine) * 3
    engine.write(wanted)
    kept = wanted.clone()
    wanted.zero_()
    assert torch.equal(parameters(engine), kept)


def test_fragments_are_written_and_shifted_alone(engine: DeepSpeedEngine) -> None:
    other = alone()
    first, second = engine.layout.fragments(2)
    change = torch.full((engine.layout.size,), 0.01)
    for one in (engine, other):
        one.write(change, first)
        one.shift(change, second)
    for name, view in engine.layout.views(parameters(engine)).items():
        assert torch.equal(view, other.layout.views(parameters(other))[name]), name
    batch = SPLIT.batch(range(4))
    assert engine.step(batch, 1e-2) == pytest.approx(other.step(batch, 1e-2), rel=1e-5)


def test_writing_parameters_keeps_the_optimizer_state(engine: DeepSpeedEngine) -> None:
    train(engine, 0, 2)
    before = engine.state()
    engine.write(torch.zeros(engine.layout.size))
    after = engine.state()
    assert engine.steps == 2
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_state_goes_from_one_engine_to_the_other_and_back(engine: DeepSpeedEngine) -> None:
    other, third = alone(), alone()
    train(other, 0, 2)
    engine.write(parameters(other))
    engine.load_state(other.state())
    assert all(torch.equal(tensor, other.state()[name]) for name, tensor in engine.state().items())
    assert train(engine, 2, 4) == pytest.approx(train(other, 2, 4), rel=1e-5)
    third.write(parameters(engine))
    third.load_state(engine.state())
    assert train(third, 4) == pytest.approx(train(other, 4), rel=1e-5)
    assert_close(third, other)


def test_its_optimizer_is_packed_like_one_engines(engine: DeepSpeedEngine) -> None:
    """So that a node of many GPUs can be audited by one of one."""
    train(engine, 0, 2)
    data = bytes(pack_state(engine))
    other = alone()
    other.write(parameters(engine))
    other.load_state(Moments.unpack(data, other.layout).state(other.layout, frozenset()))
    assert bytes(pack_state(other)) == data
    assert train(engine, 2, 4) == pytest.approx(train(other, 2, 4), rel=1e-4)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(engine: DeepSpeedEngine) -> None:
    assert engine.state() == {}
    train(engine, 0, 1)
    state = engine.state()
    name = engine.layout.spans[0].name
    wrong: list[dict[str, torch.Tensor]] = [
        {key: value for key, value in state.items() if key != f"exp_avg_sq/{name}"},
        state | {f"exp_avg/{name}": torch.zeros(3)},
        state | {"exp_avg/no.such.parameter": torch.zeros(3)},
        state | {f"step/{name}": torch.tensor(7.0)},
    ]
    for given in wrong:
        with pytest.raises(ValueError, match="inner optimizer state"):
            engine.load_state(given)
    assert all(torch.equal(tensor, state[key]) for key, tensor in engine.state().items())


def test_as_many_are_taken_at_once_as_fit_into_each_ranks_memory(
    engine: DeepSpeedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank with the least room decides: all make as many passes."""
    engine._micro_batch = None
    assert train(engine) == pytest.approx(train(alone()), rel=1e-5)
    assert engine._micro_batch is not None
    assert engine._micro_batch > 64, "there are gigabytes for kilobytes"
    ask = engine.ranks.ask

    def narrow(orders: Sequence[Order]) -> list[OrderDone]:
        answers = ask(orders)
        if isinstance(orders[0], Fit):
            assert all(answer.sequences > 64 for answer in answers)
            return [OrderDone(sequences=3), OrderDone(sequences=2)]
        return answers

    monkeypatch.setattr(engine.ranks, "ask", narrow)
    engine._micro_batch = None
    engine.evaluate(SPLIT.batch(range(1)))
    assert [rows.micro_batches for rows in engine._rank_rows(SPLIT.batch(range(8)))] == [(2, 2), (2, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_it_trains_the_same(tmp_path: Path, stage: Stage) -> None:
    engine, other = ranks(tmp_path, stage, offload=True), alone()
    assert train(engine) == pytest.approx(train(other), rel=1e-5)
    assert_close(engine, other)
    engine.load_state(other.state())
    assert train(engine, 0, 2) == pytest.approx(train(other, 0, 2), rel=1e-5)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_autocast_over_fp32_parameters(tmp_path: Path, stage: Stage) -> None:
    engine, other, plain = ranks(tmp_path, stage, precision="bf16"), alone(precision="bf16"), alone()
    losses = train(engine)
    assert losses == pytest.approx(train(other), rel=1e-2)
    assert losses != train(plain)
    wanted = parameters(engine) * 1.0001
    engine.write(wanted)
    assert torch.equal(parameters(engine), wanted), "the fp32 parameters are not rounded"
    engine.close()


# ------------------------------------------------------------------------------------------ failures


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_engine_with_its_name(tmp_path: Path) -> None:
    engine = ranks(tmp_path, 2)
    pids = engine.ranks.pids
    os.kill(pids[1], signal.SIGKILL)
    for _ in range(2):  # once it is gone it stays gone
        with pytest.raises(PsycheError, match=r"rank 1 of 2 was killed \(SIGKILL\).*join again"):
            train(engine)
    assert not any(map(alive, pids))


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_an_error_and_no_skipped_step(tmp_path: Path) -> None:
    engine = ranks(tmp_path, 1)
    engine.write(torch.full((engine.layout.size,), float("nan")))
    with pytest.raises(PsycheError, match=r"NaN or infinite: lower run\.inner\.lr"):
        train(engine)


@pytest.mark.slow
def test_a_rank_that_cannot_start_says_why_and_where_more_is(tmp_path: Path) -> None:
    with pytest.raises(PsycheError, match=r"rank \d of 2 failed: .*rank-\d\.log"):
        ranks(tmp_path, 1, devices=("cuda:98", "cuda:99"))
    assert "Traceback" in (tmp_path / "ranks" / "rank-0.log").read_text()


@pytest.mark.slow
def test_ranks_end_with_the_engine_that_nobody_holds(tmp_path: Path) -> None:
    engine = ranks(tmp_path, 1)
    pids = engine.ranks.pids
    assert all(map(alive, pids))
    del engine
    deadline = time.monotonic() + PATIENCE
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
