"""Two magnitude levels for a group of values, where they lose least: 2-means, in integers.

With a sign, that is 2 bits a value. On a real pseudo-gradient (1.9M Llama, H=30) the levels found here leave a
relative L2 error of .352 over blocks of 256, where levels at ±1/3 and ±1 of the largest magnitude leave .49 and
fixed multiples of the mean magnitude .365.

All sums are sums of integers, so that they are the same in whatever order and on whatever hardware.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psyche.numerics.codecs import bf16

ITERATIONS = 4
"""Of Lloyd's algorithm (IEEE Trans. Inf. Theory 28(2), 1982) from the mean. Four come within 0.4 % of the error of
twelve."""

FRACTION = 21
"""Bits of a magnitude in fixed point, relative to the power of two at or below the group's largest."""


def two_levels(values: Tensor) -> tuple[Tensor, Tensor]:
    """The levels of each row of ``values`` (finite fp32 ``[rows, n]``, n ≤ 512), and which values take the high one.

    Returns bf16 bits (int32 ``[rows, 2]``: low, high) and bool ``[rows, n]``. The low level of a row with a zero
    in it is zero, so that zeros stay what they are.
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
        # The least value is never above the threshold, so the lower group is never empty; the upper may be.
        low = torch.where(has_zero, 0, (total - sum_high) // (count - n_high))
        high = torch.where(n_high > 0, sum_high // n_high.clamp(min=1), low)
        threshold = (low + high) >> 1
    levels = bf16.rounded(_floating(torch.cat([low, high], dim=1), top))
    return levels, fixed > threshold


def _fixed_point(magnitudes: Tensor, top: Tensor) -> Tensor:
    """fp32 magnitudes (as bits) in units of 2^(top − 147), truncated; ``top`` is the largest biased exponent."""
    exponent = magnitudes >> 23
    fraction = magnitudes & 0x7FFFFF
    significand = torch.where(exponent > 0, fraction | 0x800000, fraction)
    shift = top - exponent.clamp(min=1) + (24 - FRACTION)
    return significand >> shift.clamp(max=31)


def _floating(fixed: Tensor, top: Tensor) -> Tensor:
    """Inverse of :func:`_fixed_point`, exact but where the result is subnormal: then rounded once."""
    exponent = top - (126 + FRACTION)
    half = exponent >> 1  # two steps, because the power of two alone may be out of range
    return fixed.to(torch.float32) * _power(half) * _power(exponent - half)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent, for the exponents of normal fp32 values."""
    return ((exponent + 127) << 23).view(torch.float32)
