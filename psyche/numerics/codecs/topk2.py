"""``topk2``: the largest values of every 4096, in 2 bits each; the others stay in the error feedback.

The scheme is SparseLoCo's (arXiv 2508.15706: top-64 of 4096, 2-bit values, e ← 0.95e + Δ); the format is our own.
SparseLoCo spends 12 bits on an index, Elias–Fano coding 8.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Buffer

from psyche.numerics.codecs import bf16
from psyche.numerics.codecs.base import MalformedPayload, TorchCodec
from psyche.numerics.codecs.int2 import check_levels
from psyche.numerics.codecs.two_levels import two_levels
from psyche.numerics.flat import ALIGNMENT

CHUNK = ALIGNMENT


class SparseChunks(NamedTuple):
    """The decoded contents of a payload, chunk by chunk."""

    levels: NDArray[np.uint16]
    """Low and high level as bf16 bits, ``[chunks, 2]``."""
    indices: NDArray[np.int64]
    """Indices within the chunk, strictly ascending, ``[chunks, kept]``."""
    negative: NDArray[np.bool_]
    """Which values are negative, ``[chunks, kept]``."""
    high: NDArray[np.bool_]
    """Which values take the high level, ``[chunks, kept]``."""

    def positions(self) -> Tensor:
        """Positions of all values within the range, int64 ``[chunks · kept]``, strictly ascending."""
        return torch.from_numpy((self.indices + CHUNK * np.arange(len(self.indices))[:, None]).reshape(-1))

    def values(self) -> Tensor:
        """Return the values, fp32 ``[chunks · kept]``."""
        levels = bf16.widened(torch.from_numpy(self.levels.astype(np.int32)))
        values = torch.where(torch.from_numpy(self.high), levels[:, 1:], levels[:, :1])
        return torch.where(torch.from_numpy(self.negative), -values, values).view(-1)


class TopK2(TorchCodec):
    """Keep the ``kept`` (a power of two) values of largest magnitude in each chunk of 4096; of equal ones, the first.

    A kept value becomes ±level, with two levels per chunk (:mod:`~psyche.numerics.codecs.two_levels`). With
    l = log2(4096/kept), a chunk of the body holds, in this order and little-endian throughout:

    - the low and the high level (bf16);
    - the high parts of the indices, ``2·kept`` bits: bit (index_i >> l) + i is set for the i-th index;
    - the low l bits of the indices, packed;
    - a bit plane of signs (``kept`` bits, 1: negative) and a bit plane of magnitudes (1: high level).

    This is Elias–Fano coding (Elias, JACM 21(2), 1974; Fano, 1971). Every set of indices has exactly one encoding, and
    every chunk has the same size: 84 bytes for 64 values, 0.164 bit per parameter. The check rejects indices that
    repeat or are out of range.
    """

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self.low_bits = (CHUNK // kept).bit_length() - 1
        self.name = "topk2" if kept == 64 else f"topk2-{kept}"
        self.chunk_bytes = 4 + kept * (2 + self.low_bits + 2) // 8

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

    def pack(self, kept: SparseChunks) -> bytes:
        """Encode ``kept`` as a body."""
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

    def unpack(self, body: memoryview | bytes) -> SparseChunks:
        """Invert :meth:`pack`. Raises :class:`MalformedPayload` where the number of indices is wrong."""
        chunks = np.frombuffer(body, np.uint8).reshape(-1, self.chunk_bytes)
        bits = np.unpackbits(chunks[:, 4:], axis=1, bitorder="little").view(bool)
        upper, lower, negative, high = np.split(bits, [2 * self.kept, -2 * self.kept, -self.kept], axis=1)
        if (upper.sum(axis=1) != self.kept).any() or upper[:, -1].any():
            raise MalformedPayload("an index is out of range, or their number is wrong")
        buckets = np.nonzero(upper)[1].reshape(-1, self.kept) - np.arange(self.kept)
        low = lower.reshape(-1, self.kept, self.low_bits) @ (1 << np.arange(self.low_bits))
        levels = np.ascontiguousarray(chunks[:, :4]).view("<u2").astype(np.uint16)
        return SparseChunks(levels, (buckets << self.low_bits) | low, negative, high)

    def _quantize(self, values: Tensor) -> bytes:
        chunks = values.view(-1, CHUNK)
        indices = largest(chunks, self.kept)
        kept = chunks.gather(1, indices)
        levels, high = two_levels(kept)
        return self.pack(
            SparseChunks(levels.numpy().astype(np.uint16), indices.numpy(), (kept < 0).numpy(), high.numpy())
        )

    def _dequantize(self, body: memoryview, count: int) -> Tensor:
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
