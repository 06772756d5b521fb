"""Simulate DiLoCo on the caller's own model, in one process.

    import torch
    from psyche import simulate

    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    inputs = torch.randn(4096, 8)
    batches = list(zip(inputs.split(32), inputs.sum(1, keepdim=True).split(32)))
    loss = lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1])
    result = simulate(model, iter(batches * 10), loss=loss, nodes=4, inner_steps=20, rounds=10, codec="int4")
    for one in result.rounds:
        print(one.round, one.train_loss, one.payload_bytes)

It runs :class:`psyche.diloco.algorithm.DiLoCo`, which distributed runs are made of: with the same data, seed and
settings its state roots equal those of a run (``tests/diloco/test_simulate.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from psyche.config import CodecSpec, Inner, Node, Outer
from psyche.diloco.algorithm import DiLoCo
from psyche.errors import PsycheError
from psyche.numerics.aggregate import AggregationRule
from psyche.numerics.backends.selection import fastest_backend
from psyche.numerics.capped_shares import capped_shares
from psyche.numerics.outer import OuterState
from psyche.training.schedules import learning_rate
from psyche.training.torch_engine import TorchEngine

Loss = Callable[[nn.Module, Any], Tensor]
"""Returns the mean loss of a model on a batch, a scalar tensor."""


@dataclass(frozen=True)
class SimulatedRound:
    """What one round did."""

    round: int
    """Number of the round, from 1."""
    train_loss: float
    """Mean over all nodes and inner steps."""
    heldout_loss: float | None
    """Mean held-out loss of the outer parameters after the round; None without held-out batches."""
    payload_bytes: float
    """Encoded bytes of one node's pseudo-gradient, mean over the nodes."""
    state_root: str
    """BLAKE3 root of θ and m after the round, in hex: what the nodes of a distributed run agree on."""


@dataclass(frozen=True)
class SimulationResult:
    """The rounds of a simulation and the bytes that it would have taken."""

    rounds: tuple[SimulatedRound, ...]
    bytes_per_node: float
    """Encoded bytes of one node's pseudo-gradients in all rounds. How many copies cross the network is up to the
    exchange, as it is for ``ddp_bytes_per_node``."""
    ddp_bytes_per_node: int
    """Bytes of one node's fp32 gradients if data-parallel training took as many steps: 4 per parameter and step."""

    @property
    def compression(self) -> float:
        """How many times fewer bytes than data-parallel training."""
        return self.ddp_bytes_per_node / self.bytes_per_node


def simulate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    nodes: int = 4,
    inner_steps: int = 20,
    rounds: int = 10,
    codec: str = "int4",
    error_feedback: float | None = None,
    inner: Mapping[str, Any] | None = None,
    outer: Mapping[str, Any] | None = None,
    aggregation: AggregationRule = "mean",
    fragments: int = 1,
    heldout: Iterable[Any] | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "fp32",
    seed: int = 0,
) -> SimulationResult:
    """Train ``model`` with DiLoCo on ``nodes`` simulated nodes, on the device where it is. Afterwards it holds θ.

    ``batches``: a list or tuple holds one source of batches for each node; anything else is one source, from which the
    nodes take their ``inner_steps`` batches of a round in turn. A source that is not an iterator, such as a
    ``DataLoader``, starts again at its end. ``loss(model, batch)`` is the mean loss. Without it, batches are token ids
    ``[sequences, length]`` or keyword arguments of a causal language model of ``transformers``.

    ``inner`` and ``outer`` are fields of :class:`psyche.config.Inner` (the schedule is constant without warm-up unless
    they say otherwise) and :class:`psyche.config.Outer`. ``error_feedback`` is β, by default the codec's own. With
    ``fragments`` > 1, a round exchanges one fragment of the layers. ``heldout`` batches are evaluated after each round.
    ``precision``: ``fp32``, ``bf16`` or ``auto``. ``seed`` seeds PyTorch, whose generators are restored afterwards.

    Each node has a copy of the model and of the inner optimizer's state; buffers are not exchanged. Raises
    :class:`PsycheError` if a source runs out, ``ValueError`` for settings that configuration files do not allow either.
    """
    if nodes < 1 or inner_steps < 1 or rounds < 1:
        raise ValueError(f"nodes, inner_steps and rounds must be positive: {nodes}, {inner_steps}, {rounds}")
    inner_settings = Inner(**{"schedule": "constant", "warmup_steps": 0, **(inner or {})})
    outer_settings = Outer(**(outer or {})).settings
    beta = CodecSpec(name=codec, **({} if error_feedback is None else {"error_feedback": error_feedback}))
    device = next(model.parameters()).device
    node = Node(device=str(device), precision=precision)
    sources = _sources(batches, nodes)
    heldout_batches = None if heldout is None else list(heldout)
    names = [f"{number:06d}" for number in range(nodes)]  # aggregated in this order
    weights = capped_shares(dict.fromkeys(names, 1))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        replicas = [
            DiLoCo(
                engine := ModuleEngine(deepcopy(model), inner_settings, node, loss),
                _initial_state(engine),
                fastest_backend(),
                codec=codec,
                settings=outer_settings,
                error_feedback=beta.error_feedback,
                fragments=fragments,
            )
            for _ in range(nodes)
        ]
        done = []
        for number in range(1, rounds + 1):
            losses, payloads = [], {}
            for name, replica, source in zip(names, replicas, sources, strict=True):
                for step in range((number - 1) * inner_steps, number * inner_steps):
                    lr = learning_rate(inner_settings, step, rounds * inner_steps, replica.engine.steps)
                    losses.append(replica.local_step(_next(source, number), lr))
                replica.snapshot()
                payloads[name] = replica.encode(number)
            for replica in replicas:
                replica.outer_step(number, replica.aggregate(payloads, weights, aggregation))
                replica.apply_outer_update(number)
            sent = sum(len(part) for payload in payloads.values() for part in payload) / nodes
            done.append(
                SimulatedRound(
                    number,
                    sum(losses) / len(losses),
                    _heldout_loss(replicas[0], heldout_batches),
                    sent,
                    replicas[0].outer.index().root.hex(),
                )
            )
    _copy_parameters(replicas[0], model)
    parameters = replicas[0].engine.layout.parameters
    return SimulationResult(tuple(done), sum(one.payload_bytes for one in done), 4 * parameters * rounds * inner_steps)


class ModuleEngine(TorchEngine):
    """A TorchEngine that trains on the caller's batches and loss."""

    def __init__(self, model: nn.Module, inner: Inner, node: Node, loss: Loss | None) -> None:
        super().__init__(model, inner, node)
        self._callers_loss = loss

    def step(self, batch: Any, lr: float) -> float:
        """Take one inner step on a batch of any kind."""
        return super().step(self._tokens(batch), lr)

    def evaluate(self, batch: Any) -> tuple[float, int]:
        """Return the sum of the loss and what it is the sum over: predicted tokens, or 1 for the caller's own loss."""
        return super().evaluate(self._tokens(batch))

    def _tokens(self, batch: Any) -> Any:
        """Return token ids as TorchEngine takes them, and any other batch as it is."""
        if self._callers_loss is not None or isinstance(batch, Mapping):
            return batch
        if not isinstance(batch, Tensor | np.ndarray):
            raise PsycheError(f"a batch is a {type(batch).__name__}: pass loss=lambda model, batch: … to simulate()")
        tokens: Any = batch.cpu().numpy() if isinstance(batch, Tensor) else batch
        return tokens.astype(np.int64, copy=False)

    def _batch_loss(self, batch: Any) -> Tensor:
        """Return the mean loss of a batch that is not token ids."""
        batch = _to_device(batch, self.device)
        with torch.autocast(self.device.type, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None):
            found = self.model(**batch).loss if self._callers_loss is None else self._callers_loss(self.model, batch)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise PsycheError("loss(model, batch) must return a scalar tensor")
        return found

    def _backward(self, batch: Any) -> Tensor:
        if isinstance(batch, np.ndarray) and self._callers_loss is None:
            return super()._backward(batch)
        found = self._batch_loss(batch)
        found.backward()  # type: ignore[no-untyped-call]
        return found.detach()

    def _eval_loss(self, batch: Any) -> tuple[float, int]:
        if isinstance(batch, np.ndarray) and self._callers_loss is None:
            return super()._eval_loss(batch)
        return float(self._batch_loss(batch)), 1

    def _fit_micro_batch(self, batch: Any) -> None:
        if isinstance(batch, np.ndarray) and self._callers_loss is None:
            super()._fit_micro_batch(batch)

    def halve_micro_batch(self, rows: int) -> bool:
        """Split batches of token ids; raise :class:`PsycheError` for others, which cannot be split."""
        if self._callers_loss is not None or self._max_rows is None:
            raise PsycheError("a batch does not fit into this device's memory: pass smaller ones to simulate()")
        return super().halve_micro_batch(rows)


def _initial_state(engine: TorchEngine) -> OuterState:
    theta = torch.empty(engine.layout.size)
    engine.read(theta)
    return OuterState.initial(theta)


def _sources(batches: Iterable[Any], nodes: int) -> list[Iterator[Any]]:
    """Return one iterator for each node: its own, or the one that all share."""
    if not isinstance(batches, list | tuple):
        return [_repeated(batches)] * nodes
    if len(batches) != nodes:
        raise ValueError(
            f"{len(batches)} sources of batches for {nodes} nodes: pass one for each, or a single iterable "
            "(iter(…) of a list of batches)"
        )
    return [_repeated(source) for source in batches]


def _repeated(source: Iterable[Any]) -> Iterator[Any]:
    """Iterate over ``source``, again from its start if it has one."""
    empty = False
    while not empty:
        empty = True
        for batch in source:
            empty = False
            yield batch
        if iter(source) is source:
            return


def _next(source: Iterator[Any], round_number: int) -> Any:
    try:
        return next(source)
    except StopIteration:
        raise PsycheError(f"there are no more batches in round {round_number}: pass a source that is longer") from None


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_to_device(value, device) for value in batch)
    return batch


def _heldout_loss(replica: DiLoCo, batches: list[Any] | None) -> float | None:
    if not batches:
        return None
    with replica.outer_params():
        found = [replica.engine.evaluate(batch) for batch in batches]
    return sum(loss for loss, _ in found) / sum(count for _, count in found)


@torch.no_grad()
def _copy_parameters(replica: DiLoCo, model: nn.Module) -> None:
    views = replica.engine.layout.views(replica.outer.theta)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(views[name])
