"""Aggregation: from many payloads to one outer gradient, with the same bits on every node.

Aggregation works slice by slice, so a reducer that holds one slice of every payload computes what a node that holds all
of them does. The weights w (``protocol/contributions.py``) sum to at most 1. Two rules:

- ``mean``: Σ w·x. A single dishonest node can move it anywhere.
- ``norm_clip``: Σ w·min(1, M/‖x‖)·x, where M is the weighted lower median of the norms. While less than half of the
  weight is dishonest, M is at most an honest node's norm, and a dishonest node moves the sum by at most w·M. The bound
  counts *weight*, not nodes: identities are free, but the weight of all new ones together is capped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from psyche.numerics.codecs.base import Codec

AggregationRule = Literal["mean", "norm_clip"]

Gradient = Callable[[int, Tensor], None]
"""Fills a tensor (``[n]`` fp32, contents ignored) with the outer gradient of slice number i of the round."""

_UNIT = 1 << 30
"""Weights are compared in whole units of 1/2^30, exactly and in any order. They fit 32 bits."""
LEAST_SCALED_WEIGHT = 2.0**-126
"""The smallest normal fp32. A scaled weight below it has too few bits to bound anything and becomes 0: its payload is
about 10³⁷ times as large as the others."""


class PayloadSlices(Protocol):
    """The encoded slices of a payload, in memory or on disk."""

    def __getitem__(self, number: int, /) -> bytes: ...


def weighted_sum(codec: Codec, payloads: Iterable[tuple[float, Buffer]], out: Tensor) -> None:
    """Compute ``out ← Σ weight · D(payload)`` over one range, in the order given, as separate multiplies and adds.

    ``payloads`` are (weight, slice) pairs in ascending node id; weights are fp32 values from ``capped_shares.py``.
    Raises ``MalformedPayload``; ``out`` is then undefined.
    """
    out.zero_()
    for weight, payload in payloads:
        codec.decode_add(payload, weight, out)


def payload_gradient(
    codec: Codec, weights: Mapping[str, float], payloads: Mapping[str, PayloadSlices], rule: AggregationRule
) -> Gradient:
    """Return the aggregate of ``payloads`` (by node id): slice i of the gradient from slice i of each, one decoded at a
    time.

    ``weights`` are fp32 values from ``capped_shares.py``, for exactly those nodes whose payloads are aggregated.
    """
    nodes = sorted(weights)

    def gradient(number: int, out: Tensor) -> None:
        used = [weights[node] for node in nodes]
        if rule == "norm_clip":
            squares = [codec.squared_norm(payloads[node][number], out.numel()) for node in nodes]
            used = clipped_weights(used, squares)
        weighted_sum(codec, ((weight, payloads[node][number]) for node, weight in zip(nodes, used, strict=True)), out)

    return gradient


def result_gradient(codec: Codec, encoded: Callable[[int], Buffer]) -> Gradient:
    """Return the gradient whose slice i is decoded from ``encoded(i)``, the result that reducers published for it."""

    def gradient(number: int, out: Tensor) -> None:
        weighted_sum(codec, [(1.0, encoded(number))], out)

    return gradient


def reduce_slice(gradient: Gradient, result_codec: Codec, number: int, count: int) -> bytes:
    """Encode slice ``number`` (``count`` parameters) of a gradient: the same bytes from every node that does it.

    ``result_codec`` must come from the backend that computes the gradient. A sum that overflows is clamped to the
    largest fp32 value: since weights are rounded, payloads at the end of the range could otherwise stop all reducers.
    """
    total = torch.empty(count, device=result_codec.device)
    gradient(number, total)
    most = torch.finfo(torch.float32).max
    return result_codec.encode(total.clamp_(-most, most), torch.zeros_like(total), None, 0.0)


def clipped_weights(weights: Sequence[float], squared_norms: Sequence[float]) -> list[float]:
    """Fold ``norm_clip`` into the weights: ``w·min(1, M/‖x‖)``, computed in fp64 and rounded once to fp32."""
    bound = weighted_median(squared_norms, weights)
    found = []
    for weight, square in zip(weights, squared_norms, strict=True):
        scaled = weight if square <= bound else float(np.float32(weight * sqrt(bound / square)))
        found.append(scaled if scaled >= LEAST_SCALED_WEIGHT or square <= bound else 0.0)
    return found


def weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return the lower weighted median: the smallest value at which the cumulative weight reaches half of the total."""
    units = [round(weight * _UNIT) for weight in weights]  # exact in fp64, then rounded once, half to even
    total, below = sum(units), 0
    for value, part in sorted(zip(values, units, strict=True)):
        below += part
        if 2 * below >= total:
            return value
    raise ValueError("the median of no values is undefined")
