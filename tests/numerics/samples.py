"""Ranges of fp32 values as pseudo-gradients may be at their worst, and exact arithmetic to judge them by."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 4096
BLOCK = 256
LARGEST = float(np.finfo(np.float32).max)
TINIEST = float(np.float32(2.0**-149))
SPECIAL = (0.0, -0.0, TINIEST, -TINIEST, 2.0**-126, 1.0, -1.0, 1e-8, 1e30)


@st.composite
def ranges(draw: st.DrawFn, *, exponents: tuple[int, int] = (-149, 127), max_chunks: int = 2) -> Tensor:
    """An fp32 range of one or more chunks whose blocks differ wildly in magnitude, spiked with special values."""
    count = draw(st.integers(1, max_chunks)) * CHUNK
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = draw(st.lists(st.integers(*exponents) | st.none(), min_size=1, max_size=8))
    blocks = []
    for block in range(count // BLOCK):
        kind = kinds[block % len(kinds)]
        with np.errstate(all="ignore"):
            values = generator.uniform(-1, 1, BLOCK) * (0.0 if kind is None else 2.0**kind)
        blocks.append(values)
    flat = np.concatenate(blocks).astype(np.float32)
    for position, value in draw(st.lists(st.tuples(st.integers(0, count - 1), st.sampled_from(SPECIAL)), max_size=6)):
        if abs(value) <= 2.0 ** exponents[1]:
            flat[position] = value
    return torch.from_numpy(flat)


def bits(values: Tensor) -> NDArray[np.uint32]:
    """The bit patterns, so that −0 is not 0 and nothing is approximately anything."""
    return values.numpy().view(np.uint32)


def nearest_fp32(exact: Fraction) -> np.float32:
    """An exact value rounded once to fp32, ties to even; beyond the largest finite value, infinity."""
    if exact == 0:
        return np.float32(0)
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    while Fraction(2) ** exponent > magnitude:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= magnitude:
        exponent += 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(magnitude / unit) * unit
    if rounded >= 2**128:
        return np.float32(np.inf if exact > 0 else -np.inf)
    return np.float32(float(rounded) if exact > 0 else -float(rounded))
