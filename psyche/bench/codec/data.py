"""What the codecs are measured on: Gaussian values, and a pseudo-gradient that is trained on the spot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from psyche.bench.codec.systems import Coder
from psyche.bench.trials import COORDINATOR, Setting, Trial, run_of
from psyche.config import BpeTokenizer, Config, Data, Inner, Model, Node, Outer
from psyche.diloco.launch import launch
from psyche.diloco.reference import play
from psyche.diloco.replica import Replica
from psyche.numerics.codecs.registry import codec
from psyche.training.models import build
from psyche.training.torch_engine import TorchEngine

SCALE = 1e-3
"""Standard deviation of Gaussian pseudo-gradients: about what a trained one has. No codec's error depends on it."""
SAMPLE = 1 << 20
"""Gaussian values on which errors are measured."""

INNER_STEPS, ROUNDS, NODES = 30, 3, 2


class Vectors(NamedTuple):
    """What passes are timed on, fp32 ``[size]`` each on one device."""

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
    """fp32 ``[SAMPLE]``."""
    return torch.randn(SAMPLE, generator=torch.Generator().manual_seed(1)).mul_(SCALE)


def default_setting(cache_directory: Path | None = None) -> Setting:
    """A Llama of 0.94M parameters on a corner of the standard library."""
    size = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    return Setting(
        model=Model(settings=size | heads | {"tie_word_embeddings": True}),
        data=Data(tokenizer=BpeTokenizer(vocab_size=512), sequence_length=64, max_documents=200),
        inner=Inner(lr=2e-3, batch_size=8, schedule="constant"),
        warmup=0.1,
        heldout_sequences=8,
        cache=cache_directory or Node().cache,
    )


def pseudo_gradient(setting: Setting) -> Tensor:
    """Δ = θ − θ_local of one of two nodes in the third round of H = 30, fp32 ``[flat size]``."""
    trial = Trial(
        system="diloco",
        codec="fp32",  # its payload is Δ itself
        nodes=NODES,
        steps=INNER_STEPS * ROUNDS,
        outer=Outer(lr=0.7, momentum=0.7),
        inner_steps=INNER_STEPS,
    )
    run = run_of(setting, trial)
    # One thread: a model this small gains little from more, and loses much where the other cores are busy.
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
        *_, (_, works) = play(launched.manifest, replicas)
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
class Loss:
    """What one coder loses of one vector."""

    rel_l2: float
    """‖x − D(Q(x))‖ / ‖x‖, without error feedback."""
    bits: float
    """Of the payload, everything counted, for each parameter."""


def loss_of(coder: Coder, values: Tensor) -> Loss:
    """Encode and decode ``values`` (fp32 ``[n]`` on the CPU) once, on the coder's device."""
    x = values.to(coder.device)
    payload = coder.encode(x, torch.zeros_like(x), None)
    decoded = torch.zeros_like(x)
    coder.decode_add(payload, 1.0, decoded)
    error = torch.linalg.vector_norm(x.double() - decoded.double()) / torch.linalg.vector_norm(x.double())
    return Loss(rel_l2=float(error), bits=8 * coder.payload_bytes(payload) / x.numel())
