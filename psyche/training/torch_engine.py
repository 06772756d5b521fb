"""TorchEngine: one model on one device, its parameters views of one flat tensor."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from psyche.config import Inner, Node
from psyche.numerics.flat import FlatLayout
from psyche.training.devices import limit_memory, pick_device, pick_precision
from psyche.training.engine import Batch


class TorchEngine:
    """One model on one device.

    Parameters are views of one flat tensor, so reading and writing them all is one copy. Weight decay
    applies to matrices only, as is usual for transformers (GPT-3, arXiv 2005.14165, and its followers).
    """

    def __init__(self, model: nn.Module, inner: Inner, node: Node) -> None:
        self.device = pick_device(node.device)
        limit_memory(node, self.device)
        self.layout = FlatLayout.of_model(model)
        self.model = model.to(self.device).train()
        self._flat = torch.zeros(self.layout.size, device=self.device)
        self._adopt_flat()
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._clip = inner.clip
        self._micro_batch = node.micro_batch
        self._autocast_dtype = pick_precision(node.precision, self.device)
        self._optimizer = adamw(self.model, inner)
        self.steps = 0

    def step(self, batch: Batch, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad(set_to_none=True)
        rows = len(batch)
        loss_sum = torch.zeros((), device=self.device)
        for piece in self._pieces(batch):
            loss = self._loss(piece) * (len(piece) / rows)
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        self.steps += 1
        return float(loss_sum)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        self.model.eval()
        total, tokens = 0.0, 0
        for piece in self._pieces(batch):
            count = len(piece) * (piece.shape[1] - 1)
            total += float(self._loss(piece)) * count
            tokens += count
        self.model.train()
        return total, tokens

    @torch.no_grad()
    def read(self, flat: Tensor) -> None:
        flat.copy_(self._flat)

    @torch.no_grad()
    def write(self, flat: Tensor, parts: Sequence[slice] | None = None) -> None:
        if parts is None:
            self._flat.copy_(flat)
        else:
            for part in parts:
                self._flat[part].copy_(flat[part])

    @torch.no_grad()
    def shift(self, flat: Tensor, parts: Sequence[slice]) -> None:
        for part in parts:
            self._flat[part].add_(flat[part].to(self.device))

    def state(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in self._named_parameters():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
        return tensors

    def load_state(self, state: dict[str, Tensor]) -> None:
        loaded: dict[Tensor, dict[str, Tensor]] = {}
        unknown = set(state)
        for name, parameter in self._named_parameters():
            own = {key: state[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in state}
            unknown -= {f"{key}/{name}" for key in own}
            if own and (len(own) != 3 or not own["exp_avg"].shape == own["exp_avg_sq"].shape == parameter.shape):
                raise ValueError(f"the inner optimizer state does not fit {name}")
            if own:
                loaded[parameter] = {
                    key: value.clone().to(self.device) if key != "step" else value.clone() for key, value in own.items()
                }
        if unknown:
            raise ValueError(f"the inner optimizer state has {min(unknown)}, which this model has not")
        self._optimizer.state.clear()
        self._optimizer.state.update(loaded)
        self.steps = min((int(own["step"]) for own in loaded.values()), default=0)

    def _pieces(self, batch: Batch) -> list[Batch]:
        size = self._micro_batch or len(batch)
        return [batch[at : at + size] for at in range(0, len(batch), size)]

    def _loss(self, batch: Batch) -> Tensor:
        tokens = torch.from_numpy(batch).to(self.device, non_blocking=True)
        autocast: AbstractContextManager[Any] = nullcontext()
        if self._autocast_dtype is not None:
            autocast = torch.autocast(self.device.type, dtype=self._autocast_dtype)
        with autocast:
            loss: Tensor = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def _adopt_flat(self) -> None:
        views = self.layout.views(self._flat)
        for name, parameter in self._named_parameters():
            views[name].copy_(parameter)
            parameter.data = views[name]


def adamw(model: nn.Module, inner: Inner) -> torch.optim.AdamW:
    """The inner optimizer: decoupled weight decay (arXiv 1711.05101) on matrices, none on vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": inner.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=inner.lr, betas=inner.betas, eps=inner.eps, fused=True)
