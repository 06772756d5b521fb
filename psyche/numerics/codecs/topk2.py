"""``topk2``: the largest few of every 4096 values, in 2 bits each; the rest waits in the error feedback.

The scheme is SparseLoCo's (arXiv 2508.15706: top-64 of 4096, 2-bit values, e ← .95e + Δ), the format ours: SparseLoCo
spends 12 bits on an index, Elias and Fano 8.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Buffer

from psyche.numerics.codecs import bf16
from psyche.numerics.codecs.base import HEADER_BYTES, DefinedCodec, MalformedPayload
from psyche.numerics.codecs.int2 import check_levels
from psyche.numerics.codecs.levels import two_levels

CHUNK = 4096


class Kept(NamedTuple):
    """What a payload says, chunk by chunk."""

    levels: NDArray[np.uint16]
    """Low and high, bf16 bits ``[chunks, 2]``."""
    indices: NDArray[np.int64]
    """Within the chunk, strictly ascending, ``[chunks, kept]``."""
    negative: NDArray[np.bool_]
    """``[chunks, kept]``."""
    high: NDArray[np.bool_]
    """Which take the high level, ``[chunks, kept]``."""

    def positions(self) -> Tensor:
        """Of all kept values within the range, ``[chunks · kept]`` int64, strictly ascending."""
        return torch.from_numpy((self.indices + CHUNK * np.arange(len(self.indices))[:, None]).reshape(-1))

    def values(self) -> Tensor:
        """fp32 ``[chunks · kept]``."""
        levels = bf16.widened(torch.from_numpy(self.levels.astype(np.int32)))
        values = torch.where(torch.from_numpy(self.high), levels[:, 1:], levels[:, :1])
        return torch.where(torch.from_numpy(self.negative), -values, values).view(-1)


class TopK2(DefinedCodec):
    """``kept`` (a power of two) values of each chunk of 4096, those of largest magnitude; of equal ones the first.

    Their values become ±level, two levels a chunk (:mod:`~psyche.numerics.codecs.levels`). With l = log2(4096/kept),
    a chunk of the body is, in this order and little-endian throughout:

    - low and high level, bf16;
    - the high parts of the indices, ``2·kept`` bits: bit (index_i >> l) + i is set for the i-th kept index;
    - the low l bits of the indices, packed;
    - a plane of signs, ``kept`` bits (1 is negative), and a plane of magnitudes (1 is the high level).

    (Elias, JACM 21(2), 1974; Fano, 1971.) Every set of indices has one encoding, and every chunk the same size:
    84 bytes for 64, hence .164 bit a parameter. A repeated index or one out of range cannot pass the check.
    """

    error_feedback = True

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self.low_bits = (CHUNK // kept).bit_length() - 1
        self.name = "topk2" if kept == 64 else f"topk2-{kept}"
        self.chunk_bytes = 4 + kept * (2 + self.low_bits + 2) // 8

    def payload_bytes(self, count: int) -> int:
        return HEADER_BYTES + self.chunk_bytes * (count // CHUNK)

    def decode_add(self, payload: Buffer, weight: float, out: Tensor) -> None:
        kept = self.unpack(self.check(payload, out.numel()))
        positions = kept.positions()
        out[positions] = out[positions].add_(kept.values().mul_(weight))

    def squared_norm(self, payload: Buffer, count: int) -> float:
        kept = self.unpack(self.check(payload, count))
        squares = np.square(bf16.widened(torch.from_numpy(kept.levels.astype(np.int32))).numpy().astype(np.float64))
        n_high = kept.high.sum(axis=1).astype(np.float64)
        sums = (self.kept - n_high) * squares[:, 0] + n_high * squares[:, 1]
        return float(np.add.accumulate(sums)[-1]) if count else 0.0

    def pack(self, kept: Kept) -> bytes:
        """The body that says ``kept``."""
        rows = len(kept.indices)
        upper = np.zeros((rows, 2 * self.kept), bool)
        np.put_along_axis(upper, (kept.indices >> self.low_bits) + np.arange(self.kept), True, axis=1)
        lower = (
            (kept.indices[:, :, None] >> np.arange(self.low_bits) & 1)
            .astype(bool)
            .reshape(rows, self.kept * self.low_bits)
        )
        bits = np.concatenate([upper, lower, kept.negative, kept.high], axis=1)
        heads = kept.levels.astype("<u2").view(np.uint8).reshape(rows, 4)
        return np.concatenate([heads, np.packbits(bits, axis=1, bitorder="little")], axis=1).tobytes()

    def unpack(self, body: memoryview | bytes) -> Kept:
        """Inverse of :meth:`pack`. Raises :class:`MalformedPayload` where the number of indices is wrong."""
        chunks = np.frombuffer(body, np.uint8).reshape(-1, self.chunk_bytes)
        bits = np.unpackbits(chunks[:, 4:], axis=1, bitorder="little").view(bool)
        upper, lower, negative, high = np.split(bits, [2 * self.kept, -2 * self.kept, -self.kept], axis=1)
        if (upper.sum(axis=1) != self.kept).any() or upper[:, -1].any():
            raise MalformedPayload("an index is out of range, or their number is wrong")
        buckets = np.nonzero(upper)[1].reshape(-1, self.kept) - np.arange(self.kept)
        low = lower.reshape(-1, self.kept, self.low_bits) @ (1 << np.arange(self.low_bits))
        levels = np.ascontiguousarray(chunks[:, :4]).view("<u2").astype(np.uint16)
        return Kept(levels, (buckets << self.low_bits) | low, negative, high)

    def _quantize(self, values: Tensor) -> bytes:
        chunks = values.view(-1, CHUNK)
        indices = largest(chunks, self.kept)
        kept = chunks.gather(1, indices)
        levels, high = two_levels(kept)
        return self.pack(Kept(levels.numpy().astype(np.uint16), indices.numpy(), (kept < 0).numpy(), high.numpy()))

    def _values(self, body: memoryview, count: int) -> Tensor:
        kept = self.unpack(body)
        values = torch.zeros(count)
        values[kept.positions()] = kept.values()
        return values

    def _check_body(self, body: memoryview, count: int) -> None:
        kept = self.unpack(body)
        check_levels(kept.levels)
        if (np.diff(kept.indices, axis=1) <= 0).any():
            raise MalformedPayload("an index is repeated or out of order")


def largest(chunks: Tensor, kept: int) -> Tensor:
    """Indices of the ``kept`` values of largest magnitude in each row, ascending, int64 ``[rows, kept]``."""
    magnitudes = chunks.abs()
    least = magnitudes.topk(kept, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, ties = magnitudes > least, magnitudes == least
    wanted = kept - above.sum(dim=1, keepdim=True)
    chosen = above | (ties & (ties.cumsum(dim=1) <= wanted))
    return chosen.nonzero()[:, 1].view(-1, kept)
