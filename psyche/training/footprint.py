"""What a model takes of memory while it trains, found without allocating it."""

from __future__ import annotations

import torch
from torch import Tensor

from psyche import config
from psyche.training.memory import kept_by
from psyche.training.models import build


def activation_bytes(spec: config.Model, length: int, *, twice: bool) -> int:
    """Bytes that one sequence of ``length`` tokens keeps for its backward pass, in bf16; ``twice``: where layers'
    activations are computed again instead.

    The model runs on the meta device, which has shapes and no values. Attention is taken to be fused: what has the
    shape of attention weights is not counted. Within a tenth of what the demo's model keeps on a CPU.
    """
    model = build(spec, device="meta").to(torch.bfloat16).train()
    if twice:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    # Without a mask transformers would look at the positions' values.
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")

    def forward() -> Tensor:
        loss: Tensor = model(input_ids=tokens, attention_mask=mask, labels=tokens, use_cache=False).loss
        return loss

    def counts(tensor: Tensor) -> bool:
        return tensor.shape[-2:] != (length, length)

    return kept_by(forward, list(model.parameters()), counts)
