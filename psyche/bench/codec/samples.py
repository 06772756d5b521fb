"""The vectors that codecs are measured on: Gaussian values, and a pseudo-gradient of a model trained in the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from psyche.bench.codec.coders import Coder
from psyche.bench.convergence.trial import COORDINATOR, Setting, Trial, run_of
from psyche.bench.harness.node_runs import llama
from psyche.config import BpeTokenizer, Config, Data, Inner, Node, Outer
from psyche.diloco.launch import launch
from psyche.diloco.reference import simulate_rounds
from psyche.diloco.replica import Replica
from psyche.numerics.codecs.registry import codec
from psyche.training.models import build
from psyche.training.torch_engine import TorchEngine

SCALE = 1e-3
"""Standard deviation of Gaussian pseudo-gradients, about that of a real one. No codec's error depends on it."""
SAMPLE = 1 << 20
"""Number of Gaussian values on which errors are measured."""

INNER_STEPS, ROUNDS, NODES = 30, 3, 2


class Vectors(NamedTuple):
    """The vectors that passes are timed on, fp32 ``[size]`` each on one device."""

    base: Tensor
    local: Tensor
    residual: Tensor
    out: Tensor

    @classmethod
    def random(cls, size: int, device: str) -> Vectors:
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(size, generator=generator).mul_(0.02)
        local = torch.randn(size, generator=generator).mul_(-SCALE).add_(base)
        zeros = (torch.zeros(size, device=device) for _ in range(2))
        return cls(base.to(device), local.to(device), *zeros)


def gaussian() -> Tensor:
    """Return Gaussian values, fp32 ``[SAMPLE]``."""
    return torch.randn(SAMPLE, generator=torch.Generator().manual_seed(1)).mul_(SCALE)


def default_setting(cache_directory: Path | None = None) -> Setting:
    """Return a Llama of 0.94M parameters on 200 documents of the standard library."""
    return Setting(
        model=llama(128, 384, 4, 4),
        data=Data(tokenizer=BpeTokenizer(vocab_size=512), sequence_length=64, max_documents=200),
        inner=Inner(lr=2e-3, batch_size=8, schedule="constant"),
        warmup=0.1,
        heldout_sequences=8,
        cache=cache_directory or Node().cache,
    )


def pseudo_gradient(setting: Setting) -> Tensor:
    """Train, and return Δ = θ − θ_local of one of two nodes in the third round of H = 30, fp32 ``[flat size]``."""
    trial = Trial(
        system="diloco",
        codec="fp32",  # its payload is Δ itself
        nodes=NODES,
        steps=INNER_STEPS * ROUNDS,
        outer=Outer(lr=0.7, momentum=0.7),
        inner_steps=INNER_STEPS,
    )
    run = run_of(setting, trial)
    # More than one thread hardly speeds up so small a model, and slows it if other cores are busy.
    node = Node(device="cpu", precision="fp32", threads=1, cache=setting.cache)
    with _threads_restored():
        launched = launch(Config(run=run, node=node), COORDINATOR)
        replicas = {}
        for number in range(NODES):
            name = f"node-{number}"
            engine = TorchEngine(build(run.model, seed=run.seed), run.inner, node)
            replicas[name] = Replica(
                launched.manifest, engine, launched.store, launched.genesis.clone(), name, name.encode()
            )
        *_, (_, works) = simulate_rounds(launched.manifest, replicas)
    layout = replicas["node-0"].engine.layout
    delta = torch.zeros(layout.size)
    for part, payload in zip(layout.slices(), works["node-0"].payload, strict=True):
        codec("fp32").decode_add(payload, 1.0, delta[part])
    return delta


@contextmanager
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class PayloadLoss:
    """Error and size of one coder's payload of one vector."""

    rel_l2: float
    """‖x − D(Q(x))‖ / ‖x‖, without error feedback."""
    bits: float
    """Bits of the payload per parameter, headers and scales included."""


def loss_of(coder: Coder, values: Tensor) -> PayloadLoss:
    """Encode and decode ``values`` (fp32 ``[n]`` on the CPU) once, on the coder's device."""
    x = values.to(coder.device)
    payload = coder.encode(x, torch.zeros_like(x), None)
    decoded = torch.zeros_like(x)
    coder.decode_add(payload, 1.0, decoded)
    error = torch.linalg.vector_norm(x.double() - decoded.double()) / torch.linalg.vector_norm(x.double())
    return PayloadLoss(rel_l2=float(error), bits=8 * coder.payload_bytes(payload) / x.numel())
