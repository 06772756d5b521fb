"""What each rank needs at each stage of ZeRO (arXiv 1910.02054, §5), with parameters and gradients in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from psyche.training.zero.settings import BUCKET

Stage = Literal[1, 2, 3]
STAGES: tuple[Stage, ...] = (1, 2, 3)
ROOM = 1.3
"""Activations, and what the allocator wastes, come on top of the tensors that are known."""


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank's tensors."""

    device: int
    """Where it trains."""
    host: int
    """Offloaded to the machine's memory."""


def rank_bytes(elements: int, stage: Stage, ranks: int, *, offload: bool) -> RankBytes:
    """Of a model of ``elements`` parameters on ``ranks`` ranks. Offloaded are masters, moments and their gradients."""
    share = -(-elements // ranks)
    model = elements if stage < 3 else share
    optimizer = 3 * share if stage < 3 or offload else 2 * share  # at stage 3 the model's share is the master, too
    kept = model + _passing(elements, stage, ranks)
    if offload:
        return RankBytes(device=4 * kept, host=4 * (optimizer + share))
    return RankBytes(device=4 * (kept + optimizer), host=0)


def bytes_to_come(elements: int, stage: Stage, ranks: int, *, moments: bool) -> int:
    """Of :func:`rank_bytes`, what a rank's first step will allocate where it trains; with ``moments``, those, too."""
    share = -(-elements // ranks)
    return 4 * (_passing(elements, stage, ranks) + 2 * share * moments)


def _passing(elements: int, stage: Stage, ranks: int) -> int:
    """Elements of gradients, and of buckets on their way."""
    gradients = elements if stage == 1 else -(-elements // ranks)
    return gradients + 2 * min(BUCKET, elements)


def least_stage(elements: int, ranks: int, free: int, *, offload: bool) -> Stage:
    """The one with the least traffic between ranks that fits into ``free`` bytes of each; 3 where none does."""
    for stage in STAGES:
        if ROOM * rank_bytes(elements, stage, ranks, offload=offload).device <= free:
            return stage
    return 3
