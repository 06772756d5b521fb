"""Codecs and the outer step in C++ (``kernels/cpu``), with the widest vectors of this processor, on several threads."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Buffer

from psyche import _native
from psyche.numerics.backends.base import Backend
from psyche.numerics.codecs.base import Codec, DefinedCodec, MalformedPayload, NonFinite
from psyche.numerics.codecs.fp32 import Fp32
from psyche.numerics.codecs.int2 import Int2
from psyche.numerics.codecs.int4 import Int4
from psyche.numerics.codecs.int8 import Int8
from psyche.numerics.codecs.names import KEPT
from psyche.numerics.codecs.topk2 import CHUNK, TopK2
from psyche.numerics.codecs.topk2e import CODED, STORED, TopK2e

_SPOKEN = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "baseline vectors"}


def levels() -> list[str]:
    """Instruction sets of the extension that this machine has, best first: ``avx512``, ``avx2``, ``baseline``."""
    return _native.levels()


class NativeBackend(Backend):
    """Importing this module raises ``ImportError`` where the extension was not compiled.

    ``level`` is one of :func:`levels`, the best by default; ``threads`` is what ``torch.get_num_threads()`` says here
    by default. Neither changes a bit of any result. Raises ``ValueError`` for a level that is not there.
    """

    name = "native"

    def __init__(self, level: str | None = None, threads: int | None = None) -> None:
        self._level = levels()[0] if level is None else level
        self._threads = torch.get_num_threads() if threads is None else threads
        self.detail = f"{_SPOKEN[self._level]}, {self._threads} thread{'s' * (self._threads != 1)}"
        how = self._level, self._threads
        fixed = [NativeTopK2(*how, kept) for kept in KEPT]
        made: list[Codec] = [NativeFp32(*how), NativeInt8(*how), NativeInt4(*how, 128), NativeInt4(*how, 32)]
        made += [NativeInt2(*how), *fixed, *map(NativeTopK2e, fixed)]
        self._codecs = {codec.name: codec for codec in made}

    def codec(self, name: str) -> Codec:
        return self._codecs[name]

    def outer_step(
        self, theta: Tensor, momentum: Tensor, gradient: Tensor, *, lr: float, mu: float, local: Tensor | None = None
    ) -> None:
        """In one pass over memory. No two of the tensors may overlap."""
        _native.outer_step(theta, momentum, gradient, lr, mu, local, self._threads, self._level)


class _Native(DefinedCodec):
    """Goes before a codec among the bases, whose passes over the range it replaces. Format and header stay that one's.

    Tensors given to one call may not overlap.
    """

    backend = "native"

    def __init__(self, level: str, threads: int, *format_: int) -> None:
        super().__init__(*format_)
        self._native = _native.Codec(self.name, level)
        self._threads = threads

    def encode(self, base: Tensor, local: Tensor, residual: Tensor | None, beta: float) -> bytes:
        payload = self._native.encode(self.header(local.numel()), base, local, residual, beta, self._threads)
        if isinstance(payload, int):
            raise NonFinite(payload)
        return payload

    def check(self, payload: Buffer, count: int) -> memoryview:
        body = self.unwrap(payload, count)
        _refuse(self._native.check(body, count, self._threads))
        return body

    def decode_add(self, payload: Buffer, weight: float, out: Tensor) -> None:
        _refuse(self._native.decode_add(self.unwrap(payload, out.numel()), weight, out, self._threads))

    def squared_norm(self, payload: Buffer, count: int) -> float:
        return self._native.squared_norm(self.check(payload, count), count)


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise MalformedPayload(reason)


class NativeFp32(_Native, Fp32):
    """:class:`Fp32`, natively."""


class NativeInt8(_Native, Int8):
    """:class:`Int8`, natively."""


class NativeInt4(_Native, Int4):
    """:class:`Int4`, natively."""


class NativeInt2(_Native, Int2):
    """:class:`Int2`, natively."""


class NativeTopK2(_Native, TopK2):
    """:class:`TopK2`, natively."""


class NativeTopK2e(TopK2e):
    """:class:`TopK2e` over a native :class:`TopK2`, with a native entropy coder."""

    backend = "native"

    def __init__(self, fixed: NativeTopK2) -> None:
        super().__init__(fixed.kept, fixed)

    def expand(self, payload: Buffer, count: int) -> bytes:
        body = self.unwrap(payload, count)
        if body[0] != CODED:
            return super().expand(payload, count)
        fixed = _native.expand(self.format.header(count), body[1:], self.format.kept, count // CHUNK)
        if fixed is None:
            raise MalformedPayload("the coded stream is corrupt")
        return fixed

    def compress(self, body: memoryview) -> bytes:
        coded = _native.compress(body, self.format.kept)
        return bytes([STORED]) + bytes(body) if coded is None else bytes([CODED]) + coded
