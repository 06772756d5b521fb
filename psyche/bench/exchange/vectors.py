"""The vectors that are averaged. Every process can draw a part of any of them, and so knows the true mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt

import torch
from torch import Tensor

BLOCK = 1 << 18
"""Elements drawn at once."""
SCALE = 1e-3
"""Standard deviation of the elements, about that of a real pseudo-gradient."""
CHECKED_BLOCKS = 8
"""Number of blocks in which a result is compared with the true mean."""


def blocks(count: int) -> list[slice]:
    """Split a vector of ``count`` elements into blocks."""
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def draw(peer: int, block: slice) -> Tensor:
    """Draw elements ``block`` of the vector of peer number ``peer``: Gaussian, fp32."""
    seed = (peer << 20) + block.start // BLOCK  # torch's generator uses 32 bits of it
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(block.stop - block.start, generator=generator).mul_(SCALE)


def checked(count: int) -> Iterator[slice]:
    """Yield the blocks in which a result is compared: spread evenly, with the first and the last."""
    every = blocks(count)
    most = min(CHECKED_BLOCKS, len(every))
    for number in sorted({round(i * (len(every) - 1) / max(most - 1, 1)) for i in range(most)}):
        yield every[number]


def true_mean(peers: Sequence[int], block: slice) -> Tensor:
    """Mean of the peers' vectors in fp64."""
    total = torch.zeros(block.stop - block.start, dtype=torch.float64)
    for peer in peers:
        total += draw(peer, block)
    return total / len(peers)


class RelativeError:
    """Accumulates ‖found − truth‖ / ‖truth‖ over blocks."""

    def __init__(self) -> None:
        self._off = self._norm = 0.0

    def add(self, found: Tensor, truth: Tensor) -> None:
        """Add a block: ``found`` in fp32, ``truth`` in fp64."""
        self._off += float((found.double() - truth).square().sum())
        self._norm += float(truth.square().sum())

    @property
    def value(self) -> float:
        return sqrt(self._off / self._norm)


def relative_error(found: Tensor, peers: Sequence[int]) -> float:
    """Relative L2 error of ``found`` (fp32 ``[n]``) against the mean of the peers' vectors, over the checked blocks."""
    error = RelativeError()
    for block in checked(len(found)):
        error.add(found[block], true_mean(peers, block))
    return error.value
