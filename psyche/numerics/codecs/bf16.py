"""bfloat16 as bit patterns: scales of the low-bit codecs, at half the size and all the range of fp32.

A product of a bf16 scale (8 significant bits) and a small code is exact in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 0x7F7F
"""Bits of the largest finite bf16."""
INFINITE = 0x7F80
SIGN = 0x8000


def rounded(values: Tensor, largest: int = LARGEST) -> Tensor:
    """Bits (int32, 0…65535) of the nearest bf16, ties to even; magnitudes beyond ``largest`` become it.

    Zero loses its sign. Integer arithmetic only, because hardware conversions may flush subnormals.
    """
    pattern = values.view(torch.int32)
    magnitude = pattern & 0x7FFFFFFF
    nearest = (magnitude + 0x7FFF + ((magnitude >> 16) & 1)) >> 16
    nearest = nearest.clamp(max=largest)
    return nearest | ((pattern < 0) & (nearest > 0)).to(torch.int32) * SIGN


def widened(pattern: Tensor) -> Tensor:
    """The fp32 values of bf16 bits (int32)."""
    return (pattern << 16).view(torch.float32)
