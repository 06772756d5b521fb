"""A training loop in plain PyTorch: the rival of psyche's engine. Needs nothing but torch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from psyche.training.devices import pick_precision


def adamw(model: nn.Module, inner: Any) -> torch.optim.AdamW:
    """Fused AdamW with the settings of ``inner`` (:class:`psyche.config.Inner`); no weight decay on vectors."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": inner.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=inner.lr, betas=inner.betas, eps=inner.eps, fused=True)


class PlainLoop:
    """A model and its optimizer on ``device``, in the precision that the engine would choose."""

    def __init__(self, model: nn.Module, device: torch.device, inner: Any, precision: str = "auto") -> None:
        self.model, self._device, self._clip = model.to(device).train(), device, inner.clip
        self._optimizer, self._precision = adamw(self.model, inner), pick_precision(precision, device)

    def step(self, batch: Tensor, micro_batch: int | None = None) -> float:
        """Train on ``batch``, int64 ``[sequences, length]``, ``micro_batch`` sequences at once; return its loss."""
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._device)
        for rows in batch.split(micro_batch or len(batch)):  # type: ignore[no-untyped-call]
            tokens = rows.to(self._device)
            with nullcontext() if self._precision is None else torch.autocast(self._device.type, self._precision):
                loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss * (len(rows) / len(batch))
            loss.backward()
            total += loss.detach()
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        return float(total)
