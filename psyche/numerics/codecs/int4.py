"""``int4`` and ``int4-32``: blockwise absmax quantization to 4 bits, blocks of 128 and 32."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from psyche.numerics.codecs import bf16
from psyche.numerics.codecs.base import MalformedPayload, TorchCodec
from psyche.numerics.flat import ALIGNMENT

LOWEST, HIGHEST = -8, 7

MAX_SCALE = bf16.LARGEST - (3 << 7)
"""Bits of the largest bf16 scale with a finite 8 × scale."""


class Int4(TorchCodec):
    """scale = peak / −8; code = round-half-even(x / scale) in −8…7; D = code × scale, exactly.

    The peak is the element of largest magnitude with its sign, the positive one of two that tie. Mapping it to −8, as
    ggml's Q4_0 does, uses all 16 codes: a step is peak/8 instead of the peak/7 of symmetric codes −7…7, which reduces
    the error by an eighth. A scale can therefore be negative. It is rounded to bf16 before codes are computed, so
    D(Q(D(y))) = D(y). A scale that underflows to zero makes all codes zero.

    The body holds all codes, two per byte, element 2j in the low half of byte j (two's complement), then all scales
    (little-endian bf16): 4 + 16/block bits per parameter.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self.name = "int4" if block == 128 else f"int4-{block}"
        self.chunk_bytes = ALIGNMENT // 2 + 2 * (ALIGNMENT // block)

    def squared_norm(self, payload: Buffer, count: int) -> float:
        codes, scales = self._split(self.check(payload, count), count)
        sums = codes.to(torch.int64).square_().sum(dim=1).numpy().astype(np.float64)
        squares = np.square(bf16.widened(scales).numpy().astype(np.float64))
        return float(np.add.accumulate(sums * squares)[-1]) if count else 0.0

    def _quantize(self, values: Tensor) -> bytes:
        blocks = values.view(-1, self.block)
        highest, lowest = blocks.amax(dim=1, keepdim=True), blocks.amin(dim=1, keepdim=True)
        peak = torch.where(highest >= -lowest, highest, lowest)
        scales = bf16.rounded(peak / -8, MAX_SCALE)
        divisor = bf16.widened(scales)
        codes = (blocks / divisor).round_().clamp_(LOWEST, HIGHEST)
        nibbles = torch.where(divisor != 0, codes, 0.0).to(torch.int32).view(-1, 2) & 15
        packed = (nibbles[:, 0] | nibbles[:, 1] << 4).to(torch.uint8)
        return packed.numpy().tobytes() + scales.numpy().astype("<u2").tobytes()

    def _dequantize(self, body: memoryview, count: int) -> Tensor:
        codes, scales = self._split(body, count)
        return codes.to(torch.float32).mul_(bf16.widened(scales).unsqueeze(1)).view(-1)

    def _check_body(self, body: memoryview, count: int) -> None:
        scales = np.frombuffer(body, "<u2", count // self.block, offset=count // 2)
        if ((scales & 0x7FFF) > MAX_SCALE).any():
            raise MalformedPayload("a scale is NaN, infinite, or so large that its values would overflow")
        if (scales == bf16.SIGN).any():
            raise MalformedPayload("a scale is −0")

    def _split(self, body: memoryview, count: int) -> tuple[Tensor, Tensor]:
        """Codes (int32 ``[blocks, block]``) and scales (bf16 bits in int32 ``[blocks]``)."""
        packed = torch.from_numpy(np.frombuffer(body, np.uint8, count // 2).astype(np.int32))
        codes = torch.stack([packed & 15, packed >> 4], dim=1).view(-1, self.block)
        scales = np.frombuffer(body, "<u2", count // self.block, offset=count // 2)
        return (codes ^ 8) - 8, torch.from_numpy(scales.astype(np.int32))
