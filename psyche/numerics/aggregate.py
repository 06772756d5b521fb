"""From many payloads to one outer gradient, the same bits on every node (DESIGN §5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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

    ``payloads`` are (weight, slice) pairs in ascending node id; weights are fp32 values from ``numerics/shares.py``.
    Raises ``MalformedPayload``; ``out`` is then undefined.
    """
    out.zero_()
    for weight, payload in payloads:
        codec.decode_add(payload, weight, out)


def gathered(codec: Codec, weights: Mapping[str, float], payloads: Mapping[str, Chunks]) -> Gradient:
    """The sum of ``payloads`` by node id, times ``weights``: slice i of the gradient from slice i of each.

    Weights are fp32 values from ``numerics/shares.py``, of whom to add up and of nobody else.
    """

    def gradient(number: int, out: Tensor) -> None:
        aggregate(codec, ((weights[node], payloads[node][number]) for node in sorted(weights)), out)

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
