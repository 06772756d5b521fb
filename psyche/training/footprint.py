"""What a model takes of memory while it trains, found without allocating it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from psyche import config
from psyche.training.memory import kept_by
from psyche.training.models import build

PROBE = 16
"""Tokens of the shortest sequence that is looked at, of three."""


def activation_bytes(spec: config.Model, length: int, *, twice: bool) -> int:
    """Bytes that one sequence of ``length`` tokens keeps for its backward pass, in bf16; ``twice``: where layers'
    activations are computed again instead.

    The model runs on the meta device, which has shapes and no values. Attention is taken to be fused: of what is kept
    without that, its weights alone grow with the square of the length, and are not counted. (By their shape they could
    not be told from what a model keeps that is as wide as its sequences are long.) Within a tenth of what the demo's
    model keeps on a CPU.
    """
    model = build(spec, device="meta").to(torch.bfloat16).train()
    if twice:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    one, two, three = (_kept(model, times * PROBE) for times in (1, 2, 3))
    squared = (three - 2 * two + one) // 2
    linear = two - one - 3 * squared
    return one - linear - squared + linear * length // PROBE


def _kept(model: nn.Module, length: int) -> int:
    """All that a sequence of so many tokens keeps, in bytes."""
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    # Without a mask transformers would look at the positions' values.
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")

    def forward() -> Tensor:
        loss: Tensor = model(input_ids=tokens, attention_mask=mask, labels=tokens, use_cache=False).loss
        return loss

    return kept_by(forward, model.parameters())
