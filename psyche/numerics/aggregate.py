"""From many payloads to one outer gradient, the same bits on every node (DESIGN §5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Buffer

from psyche.numerics.codecs.base import Codec

Gradient = Callable[[int, Tensor], None]
"""Fills a tensor (``[n]`` fp32, holding anything) with the outer gradient of slice number i of the round."""


class Chunks(Protocol):
    """The encoded slices of a payload, in memory or on disk."""

    def __getitem__(self, number: int, /) -> bytes: ...


def aggregate(codec: Codec, payloads: Iterable[tuple[float, Buffer]], out: Tensor) -> None:
    """``out ← Σ weight · D(payload)`` over one range, in the order given, as separate multiplies and adds.

    ``payloads`` are (weight, slice) pairs in ascending node id; weights are fp32 values from :func:`share`.
    Raises ``MalformedPayload``; ``out`` is then undefined.
    """
    out.zero_()
    for weight, payload in payloads:
        codec.decode_add(payload, weight, out)


def gathered(codec: Codec, tokens: Mapping[str, int], payloads: Mapping[str, Chunks]) -> Gradient:
    """The mean of ``payloads`` by node id, weighted by ``tokens``: slice i of the gradient from slice i of each."""
    weights = shares(tokens)

    def gradient(number: int, out: Tensor) -> None:
        aggregate(codec, ((weight, payloads[node][number]) for node, weight in weights.items()), out)

    return gradient


def decoded(codec: Codec, encoded: Callable[[int], Buffer]) -> Gradient:
    """The gradient whose slice i is what ``encoded(i)`` stands for."""

    def gradient(number: int, out: Tensor) -> None:
        aggregate(codec, [(1.0, encoded(number))], out)

    return gradient


def reduce_slice(gradient: Gradient, result_codec: Codec, number: int, count: int) -> bytes:
    """Slice ``number`` of a gradient, ``count`` parameters, encoded once: the same bytes from every node that does it.

    ``result_codec`` is of the backend that computes the gradient. A sum that overflows becomes the largest fp32 value:
    weights are rounded, so that payloads at the end of the range could otherwise stop every node that reduces them.
    """
    total = torch.empty(count, device=result_codec.device)
    gradient(number, total)
    most = torch.finfo(torch.float32).max
    return result_codec.encode(total.clamp_(-most, most), torch.zeros_like(total), None, 0.0)


def shares(parts: Mapping[str, int]) -> dict[str, float]:
    """Each node's :func:`share` of the sum of all ``parts``, in ascending order of node id."""
    total = sum(parts.values())
    return {node: share(parts[node], total) for node in sorted(parts)}


def share(part: int, whole: int) -> float:
    """``part / whole`` as the nearest fp32 value (ties to even), rounded once from the exact quotient.

    Needs 0 ≤ part ≤ whole, whole > 0. Rounding through fp64 would round twice.
    """
    if part == 0:
        return 0.0
    exact = Fraction(part, whole)
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    if exact < Fraction(2) ** exponent:
        exponent -= 1
    ulp = Fraction(2) ** (max(exponent, -126) - 23)  # 23 fraction bits; −126 is the least normal exponent
    return float(round(exact / ulp) * ulp)  # Fraction rounds half to even
