"""``topk2e``: an entropy-coded ``topk2`` payload, with the same values in about 9 % fewer bytes.

The indices of 64 values among 4096 carry log2 C(4096, 64) / 64 = 7.36 bits each; ``topk2`` spends 8. The coding is
lossless: selection, levels, error feedback and decoding are those of ``topk2``.
"""

from __future__ import annotations

from math import comb, log2

import numpy as np
from torch import Tensor
from typing_extensions import Buffer

from psyche.numerics.codecs.base import HEADER_BYTES, Codec, MalformedPayload
from psyche.numerics.codecs.rangecoder import BitModel, CorruptStream, RangeDecoder, RangeEncoder
from psyche.numerics.codecs.topk2 import CHUNK, SparseChunks, TopK2

STORED, CODED = 0, 1
"""First byte of the body. ``STORED``: an uncoded ``topk2`` body follows, because coding does not make it smaller."""

CLASSES = 13
"""A gap g between indices (0…4095) is sent as its class c = floor(log2(g + 1)) and the c bits below the leading one."""
MODELLED = 2
"""How many of those bits, from the top, are modelled; the others are close to uniformly random."""


class _Models:
    """The adaptive models of one slice."""

    def __init__(self) -> None:
        self.gap_class = BitModel(16)
        self.gap_top = BitModel(CLASSES << MODELLED)
        self.high = BitModel(1)
        self.level = tuple((BitModel(256), BitModel(128)) for _ in range(2))
        """Models of exponent and fraction, first of the low level, then of the high one."""


class TopK2e(Codec):
    """Codes per chunk both levels, then for each kept value the gap to the previous index, magnitude and sign."""

    def __init__(self, kept: int, fixed: Codec | None = None) -> None:
        """``fixed`` computes the ``topk2`` payloads that are coded here; by default :class:`TopK2` does."""
        self.format = TopK2(kept)
        self.fixed = self.format if fixed is None else fixed
        self.name = self.format.name.replace("topk2", "topk2e")

    def payload_bytes(self, count: int) -> int:
        return self.format.payload_bytes(count) + 1

    def expected_bytes(self, count: int) -> int:
        kept = self.format.kept
        bits = log2(comb(CHUNK, kept)) + 2 * kept + 16  # about 12 for the levels, the rest for imperfect models
        return HEADER_BYTES + 1 + round(bits / 8 * (count // CHUNK))

    def unwrap(self, payload: Buffer, count: int) -> memoryview:
        view = memoryview(payload).cast("B")
        if not HEADER_BYTES < view.nbytes <= self.payload_bytes(count):
            raise MalformedPayload(f"payload of {view.nbytes} bytes, expected at most {self.payload_bytes(count)}")
        if view[:HEADER_BYTES] != self.header(count):
            raise MalformedPayload(f"the header is not that of {self.name} for {count} elements")
        return view[HEADER_BYTES:]

    def encode(self, base: Tensor, local: Tensor, residual: Tensor | None, beta: float) -> bytes:
        fixed = self.fixed.encode(base, local, residual, beta)
        return self.header(local.numel()) + self.compress(memoryview(fixed)[HEADER_BYTES:])

    def decode_add(self, payload: Buffer, weight: float, out: Tensor) -> None:
        self.fixed.decode_add(self.expand(payload, out.numel()), weight, out)

    def check(self, payload: Buffer, count: int) -> memoryview:
        self.fixed.check(self.expand(payload, count), count)
        return self.unwrap(payload, count)

    def squared_norm(self, payload: Buffer, count: int) -> float:
        return self.fixed.squared_norm(self.expand(payload, count), count)

    def expand(self, payload: Buffer, count: int) -> bytes:
        """Decode ``payload`` to the equivalent ``topk2`` payload. Raises :class:`MalformedPayload`."""
        body, chunks = self.unwrap(payload, count), count // CHUNK
        if body[0] == STORED and body.nbytes == 1 + chunks * self.format.chunk_bytes:
            return self.format.header(count) + bytes(body[1:])
        if body[0] != CODED:
            raise MalformedPayload("the body is neither entropy-coded nor a complete topk2 body")
        try:
            return self.format.header(count) + self.format.pack(_decode(body[1:], chunks, self.format.kept))
        except CorruptStream:
            raise MalformedPayload("the coded stream is corrupt") from None

    def compress(self, body: memoryview) -> bytes:
        """Encode a ``topk2`` body as a body of this codec."""
        coded = _encode(self.format.unpack(body))
        return bytes([CODED]) + coded if len(coded) < body.nbytes else bytes([STORED]) + bytes(body)


def _encode(kept: SparseChunks) -> bytes:
    coder, models = RangeEncoder(), _Models()
    gaps = np.diff(kept.indices, axis=1, prepend=-1) - 1
    for chunk in range(len(gaps)):
        for level, (exponent, fraction) in zip(kept.levels[chunk].tolist(), models.level, strict=True):
            coder.tree(exponent, 0, level >> 7, 8)
            coder.tree(fraction, 0, level & 127, 7)
        columns = (gaps[chunk].tolist(), kept.high[chunk].tolist(), kept.negative[chunk].tolist())
        for gap, is_high, is_negative in zip(*columns, strict=True):
            size = (gap + 1).bit_length() - 1
            modelled = min(size, MODELLED)
            rest = size - modelled
            below = gap + 1 - (1 << size)
            coder.tree(models.gap_class, 0, size, 4)
            coder.tree(models.gap_top, size << MODELLED, below >> rest, modelled)
            coder.bit(models.high, 0, is_high)
            coder.raw((below & ((1 << rest) - 1)) << 1 | is_negative, rest + 1)
    return coder.finish()


def _decode(data: memoryview, chunks: int, count: int) -> SparseChunks:
    """Invert :func:`_encode`. Raises :class:`CorruptStream` for a stream that it never produces."""
    coder, models = RangeDecoder(data), _Models()
    kept = SparseChunks(
        np.empty((chunks, 2), np.uint16),
        np.empty((chunks, count), np.int64),
        np.empty((chunks, count), bool),
        np.empty((chunks, count), bool),
    )
    for chunk in range(chunks):
        for which, (exponent, fraction) in enumerate(models.level):
            kept.levels[chunk, which] = coder.tree(exponent, 0, 8) << 7 | coder.tree(fraction, 0, 7)
        index = -1
        for i in range(count):
            size = coder.tree(models.gap_class, 0, 4)
            if size >= CLASSES:
                raise CorruptStream
            modelled = min(size, MODELLED)
            rest = size - modelled
            below = coder.tree(models.gap_top, size << MODELLED, modelled) << rest
            kept.high[chunk, i] = coder.bit(models.high, 0)
            raw = coder.raw(rest + 1)
            index += 1 << size | below | raw >> 1
            if index >= CHUNK:
                raise CorruptStream
            kept.indices[chunk, i] = index
            kept.negative[chunk, i] = raw & 1
    coder.finish()
    return kept
