"""bfloat16 as bit patterns, for the scales of low-bit codecs: half the size and the full range of fp32.

The product of a bf16 scale (8 significant bits) and a small code is exact in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 0x7F7F
"""Bits of the largest finite bf16."""
INFINITE = 0x7F80
SIGN = 0x8000


def rounded(values: Tensor, largest: int = LARGEST) -> Tensor:
    """Round fp32 to the nearest bf16, ties to even, magnitudes clamped to ``largest``; returns bits (int32, 0…65535).

    Zero loses its sign. Uses integer arithmetic only, because hardware conversions may flush subnormals.
    """
    pattern = values.view(torch.int32)
    magnitude = pattern & 0x7FFFFFFF
    nearest = (magnitude + 0x7FFF + ((magnitude >> 16) & 1)) >> 16
    nearest = nearest.clamp(max=largest)
    return nearest | ((pattern < 0) & (nearest > 0)).to(torch.int32) * SIGN


def widened(pattern: Tensor) -> Tensor:
    """Convert bf16 bits (int32) to fp32."""
    return (pattern << 16).view(torch.float32)
