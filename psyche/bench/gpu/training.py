"""Tokens a second of ``TorchEngine``, beside a plain training loop with the same model, batch and optimizer."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import nn

from psyche.training.devices import pick_precision
from psyche.training.engine import Batch
from psyche.training.torch_engine import TorchEngine

WARM_UP = 3
ENGINE, LOOP, COMPILED = "TorchEngine", "plain loop", "TorchEngine, compiled"
COMPILING = 90.0
"""Seconds that must be left for compiling to be tried: about as long as a minute of it and the steps after it take."""

PEAKS: Mapping[str, float] = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H200": 989.5e12,
}
"""Dense bf16 FLOP/s by the name that CUDA gives, from NVIDIA's data sheets of A100, H100 and H200, which for the last
two state twice as much, with sparsity. Other cards have no utilisation in the report."""


@dataclass(frozen=True)
class Settings:
    """What ``TorchEngine`` reads of ``config.Inner`` and ``config.Node``, with the same defaults: the configuration
    itself needs pydantic."""

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
    """A Llama model, and what it is trained on."""

    name: str
    llama: Mapping[str, Any]
    length: int = 1024
    """Tokens of a sequence."""
    sequences: int = 64
    """Of a step."""
    steps: int = 50
    seconds: float = 10.0
    """After which no further step is begun; two are taken at least."""

    def batch(self) -> Batch:
        """Random tokens, always the same."""
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
"""That of configs/150m.yaml."""
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
    """Of the untrained model: the same for every way, up to rounding."""
    last_loss: float
    """Of the same batch, after ``WARM_UP`` + ``steps`` - 1 steps on it."""
    peak_bytes: int | None = field(default=None)
    """The most memory that torch had allocated; None on a CPU."""
    utilisation: float | None = field(default=None)
    """Share of the card's peak; None where that is unknown or precision is not bf16."""

    @property
    def tokens_per_second(self) -> float:
        return self.steps * self.sequences * self.length / self.seconds


def speeds(workload: Workload, device: torch.device, clock: Callable[[], float]) -> Iterator[Speed]:
    """The engine, then the loop with the engine's micro-batch."""
    engine = engine_speed(workload, device, clock)
    yield engine
    yield loop_speed(workload, device, clock, engine.micro_batch)


def engine_speed(workload: Workload, device: torch.device, clock: Callable[[], float]) -> Speed:
    """``TorchEngine`` as a node uses it, uncompiled. It chooses the micro-batch."""
    _begin(device)
    settings: Any = Settings(device=str(device))
    engine, batch = TorchEngine(_model(workload), settings, settings), workload.batch()
    measured = _measured(workload, device, clock, lambda: engine.step(batch, settings.lr))
    return _speed(workload, device, ENGINE, engine.layout.parameters, engine.rows(batch), measured)


def compiled_speed(workload: Workload, device: torch.device, clock: Callable[[], float], micro_batch: int) -> Speed:
    """The same with a compiled model."""
    _begin(device)
    settings: Any = Settings(device=str(device), micro_batch=micro_batch)
    engine, batch = TorchEngine(_model(workload), settings, settings), workload.batch()
    engine.use_compiled(batch[: engine.rows(batch)])
    measured = _measured(workload, device, clock, lambda: engine.step(batch, settings.lr))
    return _speed(workload, device, COMPILED, engine.layout.parameters, micro_batch, measured)


def loop_speed(workload: Workload, device: torch.device, clock: Callable[[], float], micro_batch: int) -> Speed:
    """What one would write by hand."""
    _begin(device)
    settings = Settings()
    model, batch = _model(workload).to(device).train(), torch.from_numpy(workload.batch())
    precision = pick_precision("auto", device)
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    if precision is not None:
        autocast = lambda: torch.autocast(device.type, dtype=precision)  # noqa: E731
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for rows in batch.split(micro_batch):  # type: ignore[no-untyped-call]
            tokens = rows.to(device)
            with autocast():
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss * (len(rows) / len(batch))
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(parameters, settings.clip or 0.0)
        optimizer.step()
        return float(total)

    measured = _measured(workload, device, clock, step)
    return _speed(workload, device, LOOP, sum(p.numel() for p in parameters), micro_batch, measured)


def _model(workload: Workload) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**workload.llama))
    return model.float()


def _begin(device: torch.device) -> None:
    """Free what the measurement before this one held, and count peak memory from here."""
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
