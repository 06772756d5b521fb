"""Tokens/s of ``TorchEngine``, beside a plain loop with the same model, batch and optimizer."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import nn

from psyche.bench.plain_loop import PlainLoop
from psyche.training.devices import pick_precision
from psyche.training.engine import Batch
from psyche.training.torch_engine import TorchEngine

WARM_UP = 3
ENGINE, LOOP, COMPILED = "TorchEngine", "plain loop", "TorchEngine, compiled"
COMPILING = 90.0
"""Seconds that must be left to try compilation, which takes about a minute, and the steps after it."""

PEAKS: Mapping[str, float] = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H200": 989.5e12,
}
"""Dense bf16 FLOP/s by CUDA's name of the card, from NVIDIA's data sheets of A100, H100 and H200; the latter two state
the doubled rate with sparsity. The report has no utilisation of other cards."""


@dataclass(frozen=True)
class Settings:
    """What ``TorchEngine`` reads of ``config.Inner`` and ``config.Node``, with their defaults, without pydantic."""

    optimizer: str = "adamw"
    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0
    device: str = "auto"
    precision: str = "auto"
    micro_batch: int | None = None
    activation_checkpointing: bool = False
    max_gpu_memory: str | None = None


@dataclass(frozen=True)
class Workload:
    """A Llama model and its batch."""

    name: str
    llama: Mapping[str, Any]
    length: int = 1024
    """Tokens of a sequence."""
    sequences: int = 64
    """Sequences of a step."""
    steps: int = 50
    seconds: float = 10.0
    """Time after which no further step is begun; at least two are taken."""

    def batch(self) -> Batch:
        """Return random tokens, always the same."""
        shape = self.sequences, self.length
        return np.random.default_rng(0).integers(self.llama["vocab_size"], size=shape, dtype=np.int64)

    def flops_per_token(self, parameters: int) -> float:
        """6N + 12·layers·heads·head_dim·length (PaLM, arXiv 2204.02311, appendix B), N with the tied embeddings."""
        width: int = self.llama["num_attention_heads"] * self.llama["head_dim"]
        layers: int = self.llama["num_hidden_layers"]
        return 6.0 * parameters + 12 * layers * width * self.length


def _llama(vocab: int, hidden: int, layers: int, heads: int, head_dim: int, intermediate: int) -> Mapping[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }


SMALL = Workload("30M", _llama(8192, 512, 8, 8, 64, 1408))
LARGE = Workload("150M", _llama(32000, 896, 12, 16, 64, 2432))
"""The model of configs/150m.yaml."""
TINY = Workload("tiny", _llama(128, 32, 2, 2, 16, 64), length=64, sequences=4, steps=2)


@dataclass(frozen=True)
class Speed:
    """One way to train one model."""

    model: str
    way: str
    parameters: int
    precision: str
    length: int
    sequences: int
    micro_batch: int
    steps: int
    seconds: float
    first_loss: float
    """Loss of the untrained model: equal for all ways up to rounding."""
    last_loss: float
    """Loss of the same batch after ``WARM_UP`` + ``steps`` - 1 steps on it."""
    peak_bytes: int | None = field(default=None)
    """Peak memory allocated by torch. ``None`` on a CPU."""
    utilisation: float | None = field(default=None)
    """Share of the card's peak FLOP/s. ``None`` if that is unknown or the precision is not bf16."""

    @property
    def tokens_per_second(self) -> float:
        return self.steps * self.sequences * self.length / self.seconds


def speeds(workload: Workload, device: torch.device, clock: Callable[[], float]) -> Iterator[Speed]:
    """Measure the engine, then the loop with the engine's micro-batch."""
    engine = engine_speed(workload, device, clock)
    yield engine
    yield loop_speed(workload, device, clock, engine.micro_batch)


def engine_speed(workload: Workload, device: torch.device, clock: Callable[[], float]) -> Speed:
    """Measure ``TorchEngine`` as a node uses it, uncompiled. It chooses the micro-batch."""
    _begin(device)
    settings: Any = Settings(device=str(device))
    engine, batch = TorchEngine(_model(workload), settings, settings), workload.batch()
    measured = _measured(workload, device, clock, lambda: engine.step(batch, settings.lr))
    return _speed(workload, device, ENGINE, engine.layout.parameters, engine.rows(batch), measured)


def compiled_speed(workload: Workload, device: torch.device, clock: Callable[[], float], micro_batch: int) -> Speed:
    """Measure ``TorchEngine`` with a compiled model."""
    _begin(device)
    settings: Any = Settings(device=str(device), micro_batch=micro_batch)
    engine, batch = TorchEngine(_model(workload), settings, settings), workload.batch()
    engine.use_compiled(batch[: engine.rows(batch)])
    measured = _measured(workload, device, clock, lambda: engine.step(batch, settings.lr))
    return _speed(workload, device, COMPILED, engine.layout.parameters, micro_batch, measured)


def loop_speed(workload: Workload, device: torch.device, clock: Callable[[], float], micro_batch: int) -> Speed:
    """Measure the plain loop."""
    _begin(device)
    loop, batch = PlainLoop(_model(workload), device, Settings()), torch.from_numpy(workload.batch())
    measured = _measured(workload, device, clock, lambda: loop.step(batch, micro_batch))
    parameters = sum(p.numel() for p in loop.model.parameters())
    return _speed(workload, device, LOOP, parameters, micro_batch, measured)


def _model(workload: Workload) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**workload.llama))
    return model.float()


def _begin(device: torch.device) -> None:
    """Free the memory of the measurement before, and reset the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@dataclass(frozen=True)
class _Measured:
    steps: int
    seconds: float
    losses: tuple[float, ...]


def _measured(
    workload: Workload, device: torch.device, clock: Callable[[], float], step: Callable[[], float]
) -> _Measured:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    losses = [step() for _ in range(WARM_UP)]
    began, steps = now(), 0
    while steps < workload.steps and (steps < 2 or clock() - began < workload.seconds):
        losses.append(step())
        steps += 1
    if not all(map(isfinite, losses)):
        raise FloatingPointError(f"a loss is not finite: {losses}")
    return _Measured(steps, now() - began, tuple(losses))


def _speed(
    workload: Workload, device: torch.device, way: str, parameters: int, micro_batch: int, measured: _Measured
) -> Speed:
    precision = pick_precision("auto", device)
    speed = Speed(
        model=workload.name,
        way=way,
        parameters=parameters,
        precision="bf16" if precision is torch.bfloat16 else "fp32",
        length=workload.length,
        sequences=workload.sequences,
        micro_batch=micro_batch,
        steps=measured.steps,
        seconds=measured.seconds,
        first_loss=measured.losses[0],
        last_loss=measured.losses[-1],
    )
    if device.type != "cuda":
        return speed
    speed = replace(speed, peak_bytes=torch.cuda.max_memory_allocated(device))
    peak = PEAKS.get(torch.cuda.get_device_name(device))
    if peak is None or precision is not torch.bfloat16:
        return speed
    return replace(speed, utilisation=speed.tokens_per_second * workload.flops_per_token(parameters) / peak)
