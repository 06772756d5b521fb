"""From many payloads to one outer gradient, the same bits on every node (DESIGN §5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Buffer

from psyche.numerics.codecs.base import Codec
from psyche.numerics.robust import Aggregator, clipped

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


def gathered(
    codec: Codec, weights: Mapping[str, float], payloads: Mapping[str, Chunks], aggregator: Aggregator
) -> Gradient:
    """The aggregate of ``payloads`` by node id, with ``weights``: slice i of the gradient from slice i of each.

    Weights are fp32 values from ``numerics/shares.py``, of whom to take in and of nobody else. No more of the slices is
    decoded at a time than one, unless ``aggregator`` needs to see all of them beside each other.
    """
    nodes = sorted(weights)
    counts = [weights[node] for node in nodes]

    def streamed(number: int, out: Tensor) -> None:
        used = counts
        if aggregator.kind == "norm_clip":
            used = clipped(counts, [codec.squared_norm(payloads[node][number], out.numel()) for node in nodes])
        aggregate(codec, ((weight, payloads[node][number]) for node, weight in zip(nodes, used, strict=True)), out)

    def compared(number: int, out: Tensor) -> None:
        rows, squares = torch.zeros(len(nodes), out.numel(), device=codec.device), []
        for node, row in zip(nodes, rows, strict=True):
            encoded = payloads[node][number]
            squares.append(codec.squared_norm(encoded, out.numel()))
            codec.decode_add(encoded, 1.0, row)
        aggregator.of(rows, counts, squares, out)

    return streamed if aggregator.streams else compared


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
