"""Two magnitude levels that minimise the quantization error of a group of values: 2-means, in integers.

With a sign that is 2 bits per value. On a real pseudo-gradient (1.9M Llama, H = 30, blocks of 256) the relative L2
error is 0.352; levels at ±1/3 and ±1 of the largest magnitude give 0.49, fixed multiples of the mean magnitude 0.365.

All sums are integer sums, so neither their order nor the hardware changes the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psyche.numerics.codecs import bf16

ITERATIONS = 4
"""Iterations of Lloyd's algorithm (IEEE Trans. Inf. Theory 28(2), 1982), started from the mean. The error after four
is within 0.4 % of that after twelve."""

FRACTION = 21
"""Bits of a fixed-point magnitude, relative to the power of two at or below the largest magnitude of the group."""


def two_levels(values: Tensor) -> tuple[Tensor, Tensor]:
    """Find the two levels of each row of ``values`` (finite fp32 ``[rows, n]``, n ≤ 512), and assign values to them.

    Returns bf16 bits (int32 ``[rows, 2]``: low, high) and which values take the high level (bool ``[rows, n]``). The
    low level of a row that contains a zero is zero, so zeros stay zero.
    """
    magnitudes = values.view(torch.int32) & 0x7FFFFFFF
    top = (magnitudes.amax(dim=1, keepdim=True) >> 23).clamp(min=1)
    fixed = _fixed_point(magnitudes, top)
    count, total = fixed.shape[1], fixed.sum(dim=1, keepdim=True, dtype=torch.int32)
    has_zero = (magnitudes == 0).any(dim=1, keepdim=True)
    threshold = total // count
    low = high = threshold
    for _ in range(ITERATIONS):
        above = fixed > threshold
        n_high = above.sum(dim=1, keepdim=True, dtype=torch.int32)
        sum_high = (fixed * above).sum(dim=1, keepdim=True, dtype=torch.int32)
        # the smallest value never exceeds the threshold, so the lower group is never empty; the upper one can be
        low = torch.where(has_zero, 0, (total - sum_high) // (count - n_high))
        high = torch.where(n_high > 0, sum_high // n_high.clamp(min=1), low)
        threshold = (low + high) >> 1
    levels = bf16.rounded(_floating(torch.cat([low, high], dim=1), top))
    return levels, fixed > threshold


def _fixed_point(magnitudes: Tensor, top: Tensor) -> Tensor:
    """Truncate fp32 magnitudes (as bits) to multiples of 2^(top − 147); ``top`` is the largest biased exponent."""
    exponent = magnitudes >> 23
    fraction = magnitudes & 0x7FFFFF
    significand = torch.where(exponent > 0, fraction | 0x800000, fraction)
    shift = top - exponent.clamp(min=1) + (24 - FRACTION)
    return significand >> shift.clamp(max=31)


def _floating(fixed: Tensor, top: Tensor) -> Tensor:
    """Invert :func:`_fixed_point`: exact unless the result is subnormal, then rounded once."""
    exponent = top - (126 + FRACTION)
    half = exponent >> 1  # two factors, because the power of two alone can be out of range
    return fixed.to(torch.float32) * _power(half) * _power(exponent - half)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent, for exponents of normal fp32 values."""
    return ((exponent + 127) << 23).view(torch.float32)
