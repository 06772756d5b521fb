"""``int2``: a sign and one of two magnitudes for every value, blocks of 256.

MuLoCo (arXiv 2505.23725) sends dense 2-bit pseudo-gradients with error feedback; the choice of levels is our own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from psyche.numerics.codecs import bf16
from psyche.numerics.codecs.base import MalformedPayload, TorchCodec
from psyche.numerics.codecs.two_levels import two_levels
from psyche.numerics.flat import ALIGNMENT

BLOCK = 256
"""Values that share two levels. On a real pseudo-gradient, blocks of 128 have 3 % less error and 6 % more bytes."""


class Int2(TorchCodec):
    """D = ±level, exactly, with the levels that :mod:`~psyche.numerics.codecs.two_levels` finds.

    The body holds a bit plane of signs (1: negative), a bit plane of magnitudes (1: high level), where bit i of byte j
    belongs to element 8j + i, then the low and high level of each block (little-endian bf16). 2.125 bits per parameter.
    """

    name = "int2"
    chunk_bytes = ALIGNMENT // 4 + 4 * (ALIGNMENT // BLOCK)

    def squared_norm(self, payload: Buffer, count: int) -> float:
        _, high, levels = _split(self.check(payload, count), count)
        squares = np.square(bf16.widened(levels).numpy().astype(np.float64))
        n_high = high.sum(axis=1).astype(np.float64)
        return float(np.add.accumulate((BLOCK - n_high) * squares[:, 0] + n_high * squares[:, 1])[-1]) if count else 0.0

    def _quantize(self, values: Tensor) -> bytes:
        levels, high = two_levels(values.view(-1, BLOCK))
        planes = np.packbits((values < 0).numpy(), bitorder="little"), np.packbits(high.numpy(), bitorder="little")
        return b"".join(plane.tobytes() for plane in planes) + levels.numpy().astype("<u2").tobytes()

    def _dequantize(self, body: memoryview, count: int) -> Tensor:
        negative, high, levels = _split(body, count)
        level = bf16.widened(levels)
        values = torch.where(torch.from_numpy(high), level[:, 1:], level[:, :1])
        return torch.where(torch.from_numpy(negative), -values, values).view(-1)

    def _check_body(self, body: memoryview, count: int) -> None:
        check_levels(np.frombuffer(body, "<u2", offset=count // 4).reshape(-1, 2))


def check_levels(levels: np.ndarray) -> None:
    """Raise :class:`MalformedPayload` unless 0 ≤ low ≤ high < ∞ for all pairs of bf16 levels (uint16 ``[n, 2]``)."""
    if (levels >= bf16.INFINITE).any():
        raise MalformedPayload("a level is negative, NaN or infinite")
    if (levels[:, 0] > levels[:, 1]).any():
        raise MalformedPayload("a low level is above its high level")


def _split(body: memoryview, count: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Signs and high-level flags (bool ``[blocks, 256]``) and levels (bf16 bits in int32 ``[blocks, 2]``)."""
    planes = np.unpackbits(np.frombuffer(body, np.uint8, count // 4), bitorder="little").view(bool)
    levels = np.frombuffer(body, "<u2", offset=count // 4).astype(np.int32)
    return (
        planes[:count].reshape(-1, BLOCK),
        planes[count:].reshape(-1, BLOCK),
        torch.from_numpy(levels).view(-1, 2),
    )
