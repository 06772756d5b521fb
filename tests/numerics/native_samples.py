"""What is hard on a kernel: ties, equal values, signed zeros; and payloads that somebody damaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from psyche.numerics.codecs.base import Codec
from tests.numerics.samples import CHUNK, LARGEST, TINIEST, ranges

native = pytest.importorskip(
    "psyche.numerics.backends.native",
    reason="psyche was installed without a C++ compiler, or PSYCHE_NATIVE is 0",
    exc_type=ImportError,
)

LEVELS: list[str] = native.levels()
"""All instruction sets of this machine, best first."""


@st.composite
def ties(draw: st.DrawFn, *, max_chunks: int = 3) -> Tensor:
    """A range of few distinct magnitudes with either sign, some of which differ in their lowest bits only."""
    count = draw(st.integers(1, max_chunks)) * CHUNK
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    near = draw(st.sampled_from((1.0, 1.5e-39, 3e38, 1e-20)))
    palette = (np.float32(near).view(np.uint32) + generator.integers(0, 3, 4, dtype=np.uint32)).view(np.float32)
    palette = np.append(palette, np.float32([0.0, TINIEST]))[: draw(st.integers(1, 6))]
    values = generator.choice(palette, count, p=np.random.default_rng(count).dirichlet(np.ones(len(palette))))
    return torch.from_numpy(np.where(generator.integers(0, 2, count) == 1, -values, values))


@st.composite
def huge(draw: st.DrawFn) -> Tensor:
    """A chunk within a few units in the last place of the largest fp32."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    below = generator.integers(0, draw(st.integers(1, 2**24)), CHUNK, dtype=np.uint32)
    values = (np.float32(LARGEST).view(np.uint32) - below).view(np.float32)
    return torch.from_numpy(np.where(generator.integers(0, 2, CHUNK) == 1, -values, values))


def hard_ranges() -> st.SearchStrategy[Tensor]:
    return ranges(max_chunks=3) | ties() | huge() | st.sampled_from((torch.zeros(CHUNK), -torch.zeros(CHUNK)))


def like(values: Tensor, seed: int, scale: float) -> Tensor:
    """Other values for the same range: half of them zero, the rest up to ``scale`` times the largest of its chunk."""
    generator = torch.Generator().manual_seed(seed)
    peaks = values.view(-1, CHUNK).abs().amax(dim=1, keepdim=True).clamp(max=LARGEST / 8)
    noise = (torch.rand(values.numel(), generator=generator) * 2 - 1).view(-1, CHUNK) * peaks * scale
    return torch.where(torch.rand(noise.shape, generator=generator) < 0.5, 0.0, noise).view(-1)


def misaligned(values: Tensor) -> Tensor:
    """A copy that starts one float after an aligned address."""
    shifted = torch.empty(values.numel() + 1)[1:]
    assert shifted.data_ptr() % 16 == 4
    return shifted.copy_(values)


@st.composite
def damaged(draw: st.DrawFn, codec: Codec, values: Tensor) -> bytes:
    """A payload of ``values`` with flipped bits, overwritten or swapped bytes, or another length."""
    payload = bytearray(codec.encode(values, torch.zeros_like(values), None, 1.0))
    for _ in range(draw(st.integers(1, 4))):
        at, other = (draw(st.integers(0, len(payload) - 1)) for _ in range(2))
        match draw(st.sampled_from(("flip", "byte", "swap", "tail"))):
            case "flip":
                payload[at] ^= 1 << draw(st.integers(0, 7))
            case "byte":
                payload[at] = draw(st.sampled_from((0, 0x7F, 0x80, 0xFF)) | st.integers(0, 255))
            case "swap":
                payload[at], payload[other] = payload[other], payload[at]
            case "tail":  # where scales and levels lie
                payload[-1 - at % 64] = draw(st.sampled_from((0, 0x7F, 0x80, 0xFF)))
    if draw(st.integers(0, 7)) == 0:
        return bytes(payload[: draw(st.integers(0, len(payload)))])
    if draw(st.integers(0, 15)) == 0:
        return bytes(payload) + draw(st.binary(min_size=1, max_size=9))
    return bytes(payload)
