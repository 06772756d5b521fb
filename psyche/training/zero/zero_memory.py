"""Memory of a rank at each stage of ZeRO (arXiv 1910.02054, §5), with parameters and gradients in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stage = Literal[1, 2, 3]
STAGES: tuple[Stage, ...] = (1, 2, 3)
OVERHEAD = 1.3
"""Total memory relative to the tensors counted here: activations and allocator waste come on top."""
BUCKET = 1 << 26
"""Elements reduced or gathered at once: 256 MiB, of which DeepSpeed holds two. Its own default is eight times that."""


@dataclass(frozen=True)
class RankBytes:
    """The tensors of one rank, in bytes."""

    device: int
    """Bytes on the device that trains."""
    host: int
    """Bytes offloaded to host memory."""


def rank_bytes(elements: int, stage: Stage, ranks: int, *, offload: bool) -> RankBytes:
    """Return bytes per rank for a model of ``elements`` parameters; ``offload`` moves masters, moments and their
    gradients."""
    share = -(-elements // ranks)
    model = elements if stage < 3 else share
    optimizer = 3 * share if stage < 3 or offload else 2 * share  # at stage 3 the model's partition is the master
    kept = model + _transient(elements, stage, ranks)
    if offload:
        return RankBytes(device=4 * kept, host=4 * (optimizer + share))
    return RankBytes(device=4 * (kept + optimizer), host=0)


def unallocated_bytes(elements: int, stage: Stage, ranks: int, *, moments: bool) -> int:
    """Return the part of :func:`rank_bytes` that the first step allocates on the device; ``moments``: count those,
    too."""
    share = -(-elements // ranks)
    return 4 * (_transient(elements, stage, ranks) + 2 * share * moments)


def _transient(elements: int, stage: Stage, ranks: int) -> int:
    """Elements of gradients and communication buckets."""
    gradients = elements if stage == 1 else -(-elements // ranks)
    return gradients + 2 * min(BUCKET, elements)


def least_stage(elements: int, ranks: int, free: int, *, offload: bool) -> Stage:
    """Return the stage with the least traffic between ranks that fits into ``free`` bytes per rank; 3 if none fits."""
    for stage in STAGES:
        if OVERHEAD * rank_bytes(elements, stage, ranks, offload=offload).device <= free:
            return stage
    return 3
