"""``int2``: every value in 2 bits, a sign and one of two magnitudes, blocks of 256.

Dense 2-bit pseudo-gradients with error feedback are what MuLoCo sends (arXiv 2505.23725); the levels are ours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from psyche.numerics.codecs import bf16
from psyche.numerics.codecs.base import HEADER_BYTES, DefinedCodec, MalformedPayload
from psyche.numerics.codecs.levels import two_levels

BLOCK = 256
"""Values that share two levels. 128 would lose 3 % less on a real pseudo-gradient, for 6 % more bytes."""


class Int2(DefinedCodec):
    """D = ±level, exactly, with the levels of :mod:`~psyche.numerics.codecs.levels`. 2.125 bits a parameter.

    The body is the plane of signs (1 is negative), the plane of magnitudes (1 is the high level), bit i of byte j
    for element 8j + i, then for each block its low and its high level (little-endian bf16).
    """

    name = "int2"
    error_feedback = True

    def payload_bytes(self, count: int) -> int:
        return HEADER_BYTES + count // 4 + 4 * (count // BLOCK)

    def squared_norm(self, payload: Buffer, count: int) -> float:
        _, high, levels = _split(self.check(payload, count), count)
        squares = np.square(bf16.widened(levels).numpy().astype(np.float64))
        n_high = high.sum(axis=1).astype(np.float64)
        return float(np.add.accumulate((BLOCK - n_high) * squares[:, 0] + n_high * squares[:, 1])[-1]) if count else 0.0

    def _quantize(self, values: Tensor) -> bytes:
        levels, high = two_levels(values.view(-1, BLOCK))
        planes = np.packbits((values < 0).numpy(), bitorder="little"), np.packbits(high.numpy(), bitorder="little")
        return b"".join(plane.tobytes() for plane in planes) + levels.numpy().astype("<u2").tobytes()

    def _values(self, body: memoryview, count: int) -> Tensor:
        negative, high, levels = _split(body, count)
        level = bf16.widened(levels)
        values = torch.where(torch.from_numpy(high), level[:, 1:], level[:, :1])
        return torch.where(torch.from_numpy(negative), -values, values).view(-1)

    def _check_body(self, body: memoryview, count: int) -> None:
        check_levels(np.frombuffer(body, "<u2", offset=count // 4).reshape(-1, 2))


def check_levels(levels: np.ndarray) -> None:
    """Raise :class:`MalformedPayload` unless all pairs of bf16 levels (uint16 ``[n, 2]``) are 0 ≤ low ≤ high < ∞."""
    if (levels >= bf16.INFINITE).any():
        raise MalformedPayload("a level is negative, NaN or infinite")
    if (levels[:, 0] > levels[:, 1]).any():
        raise MalformedPayload("a low level is above its high level")


def _split(body: memoryview, count: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Who is negative, who takes the high level (bool ``[blocks, 256]``), and levels (bf16 bits ``[blocks, 2]``)."""
    planes = np.unpackbits(np.frombuffer(body, np.uint8, count // 4), bitorder="little").view(bool)
    levels = np.frombuffer(body, "<u2", offset=count // 4).astype(np.int32)
    return (
        planes[:count].reshape(-1, BLOCK),
        planes[count:].reshape(-1, BLOCK),
        torch.from_numpy(levels).view(-1, 2),
    )
