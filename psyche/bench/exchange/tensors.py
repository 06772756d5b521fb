"""What is averaged: vectors that every process can make a part of, so that nobody needs to be sent the truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt

import torch
from torch import Tensor

BLOCK = 1 << 18
"""Elements that are drawn at once."""
SCALE = 1e-3
"""Standard deviation of the elements: about that of a real pseudo-gradient."""
CHECKED_BLOCKS = 8
"""Blocks in which a result is compared with the true mean, spread over the vector."""


def blocks(count: int) -> list[slice]:
    """The ranges of a vector of ``count`` elements that are drawn at once."""
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def draw(peer: int, block: slice) -> Tensor:
    """Elements ``block`` of what peer number ``peer`` brings: Gaussian, fp32."""
    seed = (peer << 20) + block.start // BLOCK  # all within 32 bits: torch's generator ignores the others
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(block.stop - block.start, generator=generator).mul_(SCALE)


def checked(count: int) -> Iterator[slice]:
    """The blocks in which results are checked, the first and the last among them."""
    every = blocks(count)
    most = min(CHECKED_BLOCKS, len(every))
    for number in sorted({round(i * (len(every) - 1) / max(most - 1, 1)) for i in range(most)}):
        yield every[number]


def true_mean(peers: Sequence[int], block: slice) -> Tensor:
    """Mean over ``peers`` of what they bring, in fp64."""
    total = torch.zeros(block.stop - block.start, dtype=torch.float64)
    for peer in peers:
        total += draw(peer, block)
    return total / len(peers)


class Error:
    """Adds up ‖found − truth‖ / ‖truth‖ over blocks."""

    def __init__(self) -> None:
        self._off = self._norm = 0.0

    def add(self, found: Tensor, truth: Tensor) -> None:
        """One block: ``found`` fp32, ``truth`` fp64."""
        self._off += float((found.double() - truth).square().sum())
        self._norm += float(truth.square().sum())

    @property
    def relative(self) -> float:
        return sqrt(self._off / self._norm)
