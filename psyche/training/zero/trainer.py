"""What one rank does: its share of each batch, and of the parameters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from psyche import config
from psyche.errors import PsycheError
from psyche.numerics.flat import FlatLayout
from psyche.training.devices import limit_memory, pick_precision
from psyche.training.engine import Batch
from psyche.training.footprint import activation_bytes
from psyche.training.labels import labels, predicted
from psyche.training.memory import free_memory, most_at_once
from psyche.training.models import build
from psyche.training.optimizers import adamw
from psyche.training.zero.memory import bytes_to_come
from psyche.training.zero.settings import deepspeed_settings
from psyche.training.zero.shards import OptimizerShards, ParameterShards, Parts
from psyche.training.zero.wire import Kind, Rows, Start

STALL = timedelta(minutes=10)
"""A collective that takes longer has lost a rank without a word."""


class Trainer:
    """One rank of an engine. All ranks call the same methods in the same order."""

    def __init__(self, order: Start, flat: Tensor, store: str) -> None:
        """``flat`` is the vector that all ranks see; ``store`` a file that they find each other by."""
        torch.set_num_threads(order.threads)
        kind = os.environ["DS_ACCELERATOR"]
        self._rank, self._ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._device = torch.device("cpu" if kind == "cpu" else f"{kind}:{os.environ['LOCAL_RANK']}")
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        limit_memory(order.memory_limit, self._device)
        torch.distributed.init_process_group(
            "nccl" if self._device.type == "cuda" else "gloo",
            store=torch.distributed.FileStore(store, self._ranks),  # type: ignore[attr-defined]  # it is documented
            rank=self._rank,
            world_size=self._ranks,
            timeout=STALL,
        )
        # Collectives over shared memory, compiled at the first start, which takes minutes and a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        inner = config.Inner.model_validate_json(order.inner)
        autocast = pick_precision(order.precision, self._device)
        settings = deepspeed_settings(
            stage=order.stage,
            offload=order.offload,
            clip=inner.clip,
            autocast=autocast,
            elements=len(flat),
            pin=self._device.type == "cuda",
        )
        model, layout = self._built(config.Model.model_validate_json(order.model), order.stage, settings)
        if order.checkpoints:
            model.activation_checkpointing_enable()  # type: ignore[operator]
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._engine, zero, *_ = deepspeed.initialize(
            model=model, optimizer=adamw(named, layout, inner), config=settings
        )
        self._groups = zero.optimizer.param_groups
        self._order, self._autocast = order, autocast
        self._optimizer = zero.optimizer
        self._end = order.end
        self._flat = flat
        self._shards = (ParameterShards if order.stage == 3 else OptimizerShards)(zero, model, layout)

    def step(self, rows: Rows, total: int, lr: float) -> float:
        """Forward and backward of this rank's sequences, then one step together. This rank's share of the mean loss."""
        for group in self._groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), device=self._device)
        for tokens, targets, count in self._pieces(rows):
            loss = self._loss(tokens, targets) * (count / total)
            self._engine.backward(loss * self._ranks)  # DeepSpeed takes the mean over the ranks
            loss_sum += loss.detach()
        self._engine.step()
        if not self._engine.was_step_applied():
            raise PsycheError("a gradient became NaN or infinite: lower run.inner.lr or clip gradients")
        return float(loss_sum)

    @torch.no_grad()
    def evaluate(self, rows: Rows) -> tuple[float, int]:
        """Sum of the loss over the tokens predicted in this rank's sequences, and their number."""
        self._engine.eval()
        total, tokens_in_all = 0.0, 0
        for tokens, targets, count in self._pieces(rows):
            loss = float(self._loss(tokens, targets))  # a rank with nothing to do takes part: others may need its share
            total += loss * count
            tokens_in_all += count
        self._engine.train()
        return total, tokens_in_all

    def fit(self, length: int) -> int:
        """How many sequences of ``length`` tokens to take at once at most. No rank runs out of memory to find it: the
        others would wait for that one."""
        order = self._order
        spec = config.Model.model_validate_json(order.model)
        each = activation_bytes(spec, length, twice=order.checkpoints) * (1 if self._autocast is not None else 2)
        free = free_memory(self._device) // (self._ranks if self._device.type == "cpu" else 1)
        moments = not order.offload and not any(self._optimizer.state.values())
        return most_at_once(each, free - bytes_to_come(len(self._flat), order.stage, self._ranks, moments=moments))

    def read(self, kind: Kind) -> None:
        """Copy what this rank holds to the shared vector."""
        self._shards.read(kind, self._flat)

    def write(self, kind: Kind, parts: Parts) -> None:
        """Take what this rank holds from the shared vector."""
        self._shards.write(kind, self._flat, parts)
        if kind == "theta":
            self._shards.publish()

    def shift(self, parts: Parts) -> None:
        """Add the shared vector to the parameters."""
        self._shards.shift(self._flat, parts)
        self._shards.publish()

    def resume(self, steps: int) -> None:
        """The optimizer stands after so many steps."""
        self._shards.resume(steps)

    def _built(self, spec: config.Model, stage: int, settings: dict[str, Any]) -> tuple[nn.Module, FlatLayout]:
        """The model, its parameters of no account yet: they are written before anything is trained."""
        whole: AbstractContextManager[Any] = nullcontext()
        if stage == 3:  # cut up while it is built: no rank ever holds all of it
            whole = deepspeed.zero.Init(config_dict_or_path=settings)  # a dtype given here becomes bf16 on a CPU
        layout = FlatLayout.of_model(build(spec, device="meta"))
        with whole:
            model = build(spec, device=str(self._device))
        return model.train(), layout

    def _pieces(self, rows: Rows) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Token ids and labels of each forward pass, and how many tokens it predicts that count."""
        tokens = np.frombuffer(rows.tokens, np.int64).reshape(-1, rows.length)
        nothing = np.zeros((1, rows.length), np.int64)
        at = 0
        for count in rows.pieces:
            piece = tokens[at : at + count] if count else nothing
            targets = labels(piece, self._end)
            yield self._moved(piece), self._moved(targets), predicted(targets) if count else 0
            at += count

    def _moved(self, rows: Batch) -> Tensor:
        return torch.from_numpy(rows.copy()).to(self._device, non_blocking=True)

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self._engine(input_ids=tokens, labels=targets, use_cache=False).loss
        return loss
