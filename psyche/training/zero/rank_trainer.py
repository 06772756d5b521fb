"""The training of one rank: its part of each batch and of the parameters."""

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
from psyche.training.engine import Batch, predicted_tokens, target_labels
from psyche.training.memory import activation_bytes, free_memory, max_micro_batch
from psyche.training.models import build
from psyche.training.optimizers import adamw
from psyche.training.zero.partitions import OptimizerPartitions, ParameterPartitions, Parts
from psyche.training.zero.rank_messages import Kind, Rows, Start
from psyche.training.zero.zero_memory import BUCKET, Stage, unallocated_bytes

STALL = timedelta(minutes=10)
"""A collective that takes longer than this has silently lost a rank."""


class Trainer:
    """One rank of a :class:`DeepSpeedEngine`. All ranks call the same methods in the same order."""

    def __init__(self, order: Start, flat: Tensor, store: str) -> None:
        """``flat`` is the vector shared by all ranks; ``store`` is the file through which they find each other."""
        torch.set_num_threads(order.threads)
        kind = os.environ["DS_ACCELERATOR"]
        self._rank, self._ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._device = torch.device("cpu" if kind == "cpu" else f"{kind}:{os.environ['LOCAL_RANK']}")
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        limit_memory(order.memory_limit, self._device)
        torch.distributed.init_process_group(
            "nccl" if self._device.type == "cuda" else "gloo",
            store=torch.distributed.FileStore(store, self._ranks),  # type: ignore[attr-defined]  # documented, but not exported
            rank=self._rank,
            world_size=self._ranks,
            timeout=STALL,
        )
        # Without this, DeepSpeed compiles shared-memory collectives at the first start, which takes minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        inner = config.Inner.model_validate_json(order.inner)
        autocast = pick_precision(order.precision, self._device)
        settings = _deepspeed_settings(
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
        self._partitions = (ParameterPartitions if order.stage == 3 else OptimizerPartitions)(zero, model, layout)

    def step(self, rows: Rows, total: int, lr: float) -> float:
        """Train on this rank's sequences and step together. Returns this rank's part of the mean loss."""
        for group in self._groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), device=self._device)
        for tokens, targets, count in self._micro_batches(rows):
            loss = self._loss(tokens, targets) * (count / total)
            self._engine.backward(loss * self._ranks)  # DeepSpeed averages over the ranks
            loss_sum += loss.detach()
        self._engine.step()
        if not self._engine.was_step_applied():
            raise PsycheError("a gradient became NaN or infinite: lower run.inner.lr or set run.inner.clip")
        return float(loss_sum)

    @torch.no_grad()
    def evaluate(self, rows: Rows) -> tuple[float, int]:
        """Sum of the loss over the predicted tokens of this rank's sequences, and their number."""
        self._engine.eval()
        total, tokens_in_all = 0.0, 0
        for tokens, targets, count in self._micro_batches(rows):
            # also on a rank without sequences: the others may need its parameters
            loss = float(self._loss(tokens, targets))
            total += loss * count
            tokens_in_all += count
        self._engine.train()
        return total, tokens_in_all

    def fit(self, length: int) -> int:
        """Return the most sequences of ``length`` tokens per forward pass, estimated without running out of memory.

        An out-of-memory error on one rank would leave the others waiting in a collective.
        """
        order = self._order
        spec = config.Model.model_validate_json(order.model)
        each = activation_bytes(spec, length, recompute=order.checkpoints) * (1 if self._autocast is not None else 2)
        free = free_memory(self._device) // (self._ranks if self._device.type == "cpu" else 1)
        moments = not order.offload and not any(self._optimizer.state.values())
        return max_micro_batch(
            each, free - unallocated_bytes(len(self._flat), order.stage, self._ranks, moments=moments)
        )

    def read(self, kind: Kind) -> None:
        """Copy this rank's part of ``kind`` to the shared vector."""
        self._partitions.read(kind, self._flat)

    def write(self, kind: Kind, parts: Parts) -> None:
        """Copy this rank's part of the ranges ``parts`` from the shared vector."""
        self._partitions.write(kind, self._flat, parts)
        if kind == "theta":
            self._partitions.publish()

    def shift(self, parts: Parts) -> None:
        """Add the shared vector to the parameters in the ranges ``parts``."""
        self._partitions.shift(self._flat, parts)
        self._partitions.publish()

    def resume(self, steps: int) -> None:
        """Set the optimizer's step count."""
        self._partitions.resume(steps)

    def _built(self, spec: config.Model, stage: int, settings: dict[str, Any]) -> tuple[nn.Module, FlatLayout]:
        """Build the model. Its initial values do not matter: parameters are written before training."""
        whole: AbstractContextManager[Any] = nullcontext()
        if stage == 3:  # partitioned while it is built, so no rank ever holds all of it
            whole = deepspeed.zero.Init(config_dict_or_path=settings)  # a dtype given here would become bf16 on a CPU
        layout = FlatLayout.of_model(build(spec, device="meta"))
        with whole:
            model = build(spec, device=str(self._device))
        return model.train(), layout

    def _micro_batches(self, rows: Rows) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield token ids, labels and the number of predicted tokens of each forward pass."""
        tokens = np.frombuffer(rows.tokens, np.int64).reshape(-1, rows.length)
        nothing = np.zeros((1, rows.length), np.int64)
        at = 0
        for count in rows.micro_batches:
            part = tokens[at : at + count] if count else nothing
            targets = target_labels(part, self._end)
            yield self._moved(part), self._moved(targets), predicted_tokens(targets) if count else 0
            at += count

    def _moved(self, rows: Batch) -> Tensor:
        return torch.from_numpy(rows.copy()).to(self._device, non_blocking=True)

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self._engine(input_ids=tokens, labels=targets, use_cache=False).loss
        return loss


def _deepspeed_settings(
    *,
    stage: Stage,
    offload: bool,
    clip: float | None,
    autocast: torch.dtype | None,
    elements: int,
    pin: bool,
) -> dict[str, Any]:
    """Return the configuration for ``deepspeed.initialize``, for a model of ``elements`` parameters; ``pin`` host
    memory."""
    bucket = min(BUCKET, elements)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": 2 * bucket}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # without effect: psyche splits batches and weights losses itself
        "managed_gradient_accumulation": False,  # psyche decides where a step ends
        "gradient_clipping": clip or 0.0,
        "zero_optimization": zero,
        # torch's AdamW also on the CPU: DeepSpeed's own is compiled for a minute at the first start
        "zero_force_ds_cpu_optimizer": False,
    }
    if autocast is not None:
        # fp32 parameters under autocast, like TorchEngine, so that both compute the same from the same data
        settings["torch_autocast"] = {"enabled": True, "dtype": str(autocast).removeprefix("torch.")}
    return settings
