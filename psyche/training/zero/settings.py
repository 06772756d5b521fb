"""DeepSpeed's configuration, made from ours."""

from __future__ import annotations

from typing import Any, Literal

import torch

BUCKET = 1 << 26
"""Elements reduced or gathered at once: 256 MiB, of which DeepSpeed holds two; its own default is eight times that."""


def deepspeed_settings(
    *,
    stage: Literal[1, 2, 3],
    offload: bool,
    clip: float | None,
    autocast: torch.dtype | None,
    elements: int,
    pin: bool,
) -> dict[str, Any]:
    """What ``deepspeed.initialize`` gets; ``elements`` is the size of the model, ``pin`` for copies to a GPU."""
    bucket = min(BUCKET, elements)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": 2 * bucket}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # of no effect: batches are ours, and loss and gradients weighted by us
        "managed_gradient_accumulation": False,  # a step ends where we say
        "gradient_clipping": clip or 0.0,
        "zero_optimization": zero,
        # torch's AdamW, on the processor as well: DeepSpeed's own one is compiled for a minute at the first start
        "zero_force_ds_cpu_optimizer": False,
    }
    if autocast is not None:
        # fp32 parameters under autocast, as TorchEngine trains them: both make the same of the same data
        settings["torch_autocast"] = {"enabled": True, "dtype": str(autocast).removeprefix("torch.")}
    return settings
