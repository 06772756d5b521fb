"""The codec interface, and the header of every payload slice."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import Buffer

from psyche.numerics.flat import ALIGNMENT

_HEADER = struct.Struct("<4sB3x16sQ")  # magic, version, zeros, codec name, element count
_MAGIC = b"psyc"
_VERSION = 2
HEADER_BYTES = _HEADER.size
"""32 bytes, so that the body of an aligned payload starts on a 16-byte boundary, as wide loads require."""


class NonFinite(ValueError):
    """A value to encode is NaN or infinite. ``position`` is the index of the first one in the range."""

    def __init__(self, position: int) -> None:
        super().__init__(f"value {position} of the range is NaN or infinite")
        self.position = position


class MalformedPayload(ValueError):
    """The bytes are not a valid payload of this codec for this number of elements. Nothing was written."""


class Codec(ABC):
    """A pair of pure functions between a flat fp32 range and the bytes of one payload slice.

    A codec knows nothing of peers, rounds, files or layouts. Tensors are contiguous fp32 of shape ``[n]``, n a multiple
    of 4096. Callers use this interface only. The :class:`TorchCodec` of the same name defines every bit of the result.
    """

    name: str
    """As manifests and headers spell it, block size or density included; at most 16 characters."""
    error_feedback: bool = True
    """Whether the quantization error is kept for the next round. False for lossless codecs."""
    backend: str = "torch"
    """The name of the backend that computes it."""
    device: torch.device = torch.device("cpu")
    """The device of the tensors that it takes."""

    @abstractmethod
    def encode(self, base: Tensor, local: Tensor, residual: Tensor | None, beta: float) -> bytes:
        """Encode the pseudo-gradient Δ = base − local of one range.

        With a ``residual`` e, apply error feedback in place: e ← βe + Δ; payload = Q(e); e ← e − D(payload). Without
        one the payload is Q(Δ). Raises :class:`NonFinite`; the contents of the residual are then undefined.
        """

    @abstractmethod
    def decode_add(self, payload: Buffer, weight: float, out: Tensor) -> None:
        """Compute ``out += weight · D(payload)``, with one rounding for the product and one for the sum.

        ``weight`` must be an fp32 value. Raises :class:`MalformedPayload` before anything is written.
        """

    @abstractmethod
    def check(self, payload: Buffer, count: int) -> memoryview:
        """Validate a payload of ``count`` elements and return its body. Raises :class:`MalformedPayload`."""

    def unwrap(self, payload: Buffer, count: int) -> memoryview:
        """Validate only size and header of a payload and return its body. Raises :class:`MalformedPayload`."""
        view = memoryview(payload).cast("B")
        if view.nbytes != self.payload_bytes(count):
            raise MalformedPayload(f"payload of {view.nbytes} bytes, expected {self.payload_bytes(count)}")
        if view[:HEADER_BYTES] != self.header(count):
            raise MalformedPayload(f"the header is not that of {self.name} for {count} elements")
        return view[HEADER_BYTES:]

    @abstractmethod
    def payload_bytes(self, count: int) -> int:
        """Return the maximum size in bytes of a slice of ``count`` elements, header included. Most codecs always reach
        it."""

    def expected_bytes(self, count: int) -> int:
        """Return the typical size in bytes of a slice of ``count`` elements; below ``payload_bytes`` where sizes
        vary."""
        return self.payload_bytes(count)

    @abstractmethod
    def squared_norm(self, payload: Buffer, count: int) -> float:
        """‖D(payload)‖², the same fp64 value on every node. Checks the payload first."""

    def header(self, count: int) -> bytes:
        """Return the first ``HEADER_BYTES`` of a payload of ``count`` elements."""
        return _HEADER.pack(_MAGIC, _VERSION, self.name.encode(), count)


class TorchCodec(Codec):
    """A codec written in PyTorch: a quantizer Q, a decoder D and a check. The rest is the same for all of them."""

    chunk_bytes: int
    """Bytes of the payload's body for every 4096 values."""

    def payload_bytes(self, count: int) -> int:
        return HEADER_BYTES + self.chunk_bytes * (count // ALIGNMENT)

    def encode(self, base: Tensor, local: Tensor, residual: Tensor | None, beta: float) -> bytes:
        delta = torch.sub(base, local)
        if residual is not None:
            delta = residual.mul(beta).add_(delta)
        require_finite(delta)
        body = self._quantize(delta)
        if residual is not None:
            residual.copy_(delta.sub_(self._dequantize(memoryview(body), delta.numel())))
        return self.header(delta.numel()) + body

    def decode_add(self, payload: Buffer, weight: float, out: Tensor) -> None:
        out.add_(self._dequantize(self.check(payload, out.numel()), out.numel()).mul_(weight))

    def check(self, payload: Buffer, count: int) -> memoryview:
        body = self.unwrap(payload, count)
        self._check_body(body, count)
        return body

    @abstractmethod
    def _quantize(self, values: Tensor) -> bytes:
        """Q: encode finite fp32 ``[n]`` as the bytes of a body."""

    @abstractmethod
    def _dequantize(self, body: memoryview, count: int) -> Tensor:
        """D: decode a checked body to a new fp32 tensor ``[count]``."""

    @abstractmethod
    def _check_body(self, body: memoryview, count: int) -> None:
        """Raise :class:`MalformedPayload` where a body of the right size cannot be decoded to finite values."""


def require_finite(values: Tensor) -> None:
    """Raise :class:`NonFinite` with the position of the first NaN or infinity."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        raise NonFinite(int(torch.argmin(finite.to(torch.uint8))))
