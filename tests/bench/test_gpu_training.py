"""The training speed that scripts/gpu_check.sh measures, on a tiny model and the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from psyche.bench.gpu import training
from psyche.bench.gpu.environment import Budget
from psyche.bench.gpu.report import Report
from psyche.config import Inner, Node
from tests.bench.stubs import Clock

REPOSITORY = Path(__file__).parents[2]


def speed(way: str = training.ENGINE, seconds: float = 1.0) -> training.Speed:
    return training.Speed("tiny", way, 24736, "fp32", 64, 4, 4, 2, seconds, first_loss=4.8, last_loss=4.7)


def test_engine_and_loop_train_the_same_and_are_measured_alike() -> None:
    """The clock moves by a second each time it is looked at: before the steps, before the third, and after them."""
    engine, loop = training.speeds(training.TINY, torch.device("cpu"), Clock(tick=1.0))
    assert (engine.way, loop.way) == (training.ENGINE, training.LOOP)
    assert engine.parameters == loop.parameters == 24736
    assert engine.micro_batch == loop.micro_batch == 4
    assert engine.first_loss == pytest.approx(loop.first_loss, rel=1e-4)
    assert engine.last_loss == pytest.approx(loop.last_loss, rel=1e-4)
    assert engine.last_loss < engine.first_loss
    assert (engine.steps, engine.seconds, engine.tokens_per_second) == (2, 1.0, 2 * 4 * 64)


def test_slow_steps_are_limited_in_number() -> None:
    losses: list[float] = []
    clock = Clock()

    def step() -> float:
        clock.now += 7
        losses.append(1.0)
        return losses[-1]

    measured = training._measured(training.LARGE, torch.device("cpu"), clock, step)
    assert (measured.steps, measured.seconds) == (2, 14)
    assert len(losses) == training.WARM_UP + 2


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        training._measured(training.TINY, torch.device("cpu"), Clock(), lambda: float("nan"))


def test_the_table_has_the_ratio_to_the_plain_loop(tmp_path: Path) -> None:
    report = Report(tmp_path, Budget(480, Clock()), timed=True)
    report.speeds = [speed(), speed(training.LOOP, seconds=2.0)]
    table = report.save()
    settings, times = "| tiny | TorchEngine | 24,736 | fp32 | 4 × 64 | 4 |", "512 | 2.00× | 500.0"
    assert f"{settings} {times} | – | – | 4.8000 | 4.7000 |" in table


def test_utilisation_is_of_the_dense_peak_of_cards_that_have_a_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    measured = training._Measured(steps=1, seconds=1.0, losses=(10.0, 9.0))

    def of_card() -> training.Speed:
        return training._speed(training.LARGE, torch.device("cuda"), training.ENGINE, 151181184, 64, measured)

    per_token = 6 * 151181184 + 12 * 12 * 1024 * 1024
    assert of_card().utilisation == pytest.approx(64 * 1024 * per_token / 989.5e12)
    assert of_card().peak_bytes == 2**30
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 MIG 1g.18gb")
    assert of_card().utilisation is None


def test_settings_and_models_are_those_of_the_configuration() -> None:
    for name, value in vars(training.Settings()).items():
        assert value == getattr(Inner() if name in Inner.model_fields else Node(), name), name
    published = yaml.safe_load((REPOSITORY / "configs" / "150m.yaml").read_text())["run"]["model"]
    assert (published["architecture"], published["settings"]) == ("llama", training.LARGE.llama)
