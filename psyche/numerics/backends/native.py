"""Codecs and the outer step in C++ (``kernels/cpu``): the widest vectors of this processor, several threads."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Buffer

from psyche import _native
from psyche.numerics.backends.base import Backend
from psyche.numerics.codecs import registry
from psyche.numerics.codecs.base import Codec, MalformedPayload, NonFinite
from psyche.numerics.codecs.topk2 import CHUNK
from psyche.numerics.codecs.topk2e import CODED, STORED, TopK2e
from psyche.numerics.outer import OuterSettings

_LEVEL_NAMES = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "baseline vectors"}


def levels() -> list[str]:
    """Instruction sets that extension and machine both have, best first: ``avx512``, ``avx2``, ``baseline``."""
    return _native.levels()


class NativeBackend(Backend):
    """The C++ backend. Importing this module raises ``ImportError`` where the extension is not compiled.

    ``level`` is one of :func:`levels`, by default the best; ``threads`` defaults to ``torch.get_num_threads()``.
    Neither changes any bit of a result. Raises ``ValueError`` for an unavailable level.
    """

    name = "native"

    def __init__(self, level: str | None = None, threads: int | None = None) -> None:
        self._level = levels()[0] if level is None else level
        if self._level not in levels():
            raise ValueError(f"instruction set {level} is not available here: choose from {', '.join(levels())}")
        self._threads = torch.get_num_threads() if threads is None else threads
        self.detail = f"{_LEVEL_NAMES[self._level]}, {self._threads} thread{'s' * (self._threads != 1)}"
        self._codecs: dict[str, Codec] = {}

    def codec(self, name: str) -> Codec:
        if name not in self._codecs:
            self._codecs[name] = self._accelerated(registry.codec(name))
        return self._codecs[name]

    def _accelerated(self, definition: Codec) -> Codec:
        """Return the codec in C++, or in PyTorch where ``kernels/cpu`` does not implement it."""
        if isinstance(definition, TopK2e):
            fixed = self._accelerated(definition.format)
            return NativeTopK2e(definition.format.kept, fixed) if isinstance(fixed, NativeCodec) else definition
        try:
            kernels = _native.Codec(definition.name, self._level)
        except ValueError:
            return definition
        return NativeCodec(definition, kernels, self._threads)

    def outer_step(
        self, theta: Tensor, momentum: Tensor, gradient: Tensor, settings: OuterSettings, local: Tensor | None = None
    ) -> None:
        """Apply the outer step in one pass over memory. The tensors must not overlap."""
        arguments = settings.kernel_arguments
        if arguments is None:
            super().outer_step(theta, momentum, gradient, settings, local)
        else:
            _native.outer_step(theta, momentum, gradient, *arguments, local, self._threads, self._level)


class NativeCodec(Codec):
    """A codec in C++, with the payload format of ``definition``. Tensors given to one call must not overlap."""

    backend = "native"

    def __init__(self, definition: Codec, kernels: _native.Codec, threads: int) -> None:
        self.name, self.error_feedback = definition.name, definition.error_feedback
        self._definition, self._kernels, self._threads = definition, kernels, threads

    def payload_bytes(self, count: int) -> int:
        return self._definition.payload_bytes(count)

    def encode(self, base: Tensor, local: Tensor, residual: Tensor | None, beta: float) -> bytes:
        payload = self._kernels.encode(self.header(local.numel()), base, local, residual, beta, self._threads)
        if isinstance(payload, int):
            raise NonFinite(payload)
        return payload

    def check(self, payload: Buffer, count: int) -> memoryview:
        body = self.unwrap(payload, count)
        _raise_if(self._kernels.check(body, count, self._threads))
        return body

    def decode_add(self, payload: Buffer, weight: float, out: Tensor) -> None:
        _raise_if(self._kernels.decode_add(self.unwrap(payload, out.numel()), weight, out, self._threads))

    def squared_norm(self, payload: Buffer, count: int) -> float:
        return self._kernels.squared_norm(self.check(payload, count), count)


def _raise_if(fault: str | None) -> None:
    if fault is not None:
        raise MalformedPayload(fault)


class NativeTopK2e(TopK2e):
    """``topk2e`` over a native ``topk2``, with the entropy coder in C++."""

    backend = "native"

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
