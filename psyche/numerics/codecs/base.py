"""The codec interface, and the header every slice of a payload starts with."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import Buffer

_HEADER = struct.Struct("<4sB3x16sQ")  # magic, version, zeros, codec name, element count
_MAGIC = b"psyc"
_VERSION = 2
HEADER_BYTES = _HEADER.size
"""32: what follows starts on a 16-byte boundary of a payload that does, as wide loads want it."""


class NonFinite(ValueError):
    """A value to encode is NaN or infinite. ``position`` is the index of the first within the range given."""

    def __init__(self, position: int) -> None:
        super().__init__(f"value {position} of the range is NaN or infinite")
        self.position = position


class MalformedPayload(ValueError):
    """Bytes that are not a payload of this codec for this many elements. Nothing was written."""


class Codec(ABC):
    """A pure pair of functions between a flat fp32 range and the bytes of one slice (DESIGN §5).

    A codec knows nothing of peers, rounds, files or layouts. Tensors are contiguous fp32 of shape ``[n]``,
    ``n`` a multiple of 4096. This is all that callers use. What it must compute, to the bit, is what the
    :class:`DefinedCodec` of the same name computes.
    """

    name: str
    """As manifests and headers spell it, block size or density included; at most 16 characters."""
    error_feedback: bool
    """Whether what quantization loses is kept for the next round. Off where nothing is lost."""
    backend: str = "torch"
    """What computes it: ``torch`` is the definition."""
    device: torch.device = torch.device("cpu")
    """Where its tensors lie."""

    @abstractmethod
    def encode(self, base: Tensor, local: Tensor, residual: Tensor | None, beta: float) -> bytes:
        """Encode the pseudo-gradient Δ = base − local of one range, with error feedback.

        With ``residual`` e: e ← βe + Δ; payload = Q(e); e ← e − D(payload), in place. Without: Q(Δ).
        Raises :class:`NonFinite`; what the residual holds is then undefined.
        """

    @abstractmethod
    def decode_add(self, payload: Buffer, weight: float, out: Tensor) -> None:
        """``out += weight · D(payload)``, one rounding for the product and one for the sum.

        ``weight`` must be an fp32 value. Raises :class:`MalformedPayload` before anything is written.
        """

    @abstractmethod
    def check(self, payload: Buffer, count: int) -> memoryview:
        """The payload's body, if it is one of this codec for ``count`` elements with sane content.

        Raises :class:`MalformedPayload` with the reason.
        """

    def unwrap(self, payload: Buffer, count: int) -> memoryview:
        """The payload's body, of which only size and header were checked. Raises :class:`MalformedPayload`."""
        view = memoryview(payload).cast("B")
        if view.nbytes != self.payload_bytes(count):
            raise MalformedPayload(f"{view.nbytes} bytes where {self.payload_bytes(count)} were due")
        if view[:HEADER_BYTES] != self.header(count):
            raise MalformedPayload(f"the header is not that of {self.name} for {count} elements")
        return view[HEADER_BYTES:]

    @abstractmethod
    def payload_bytes(self, count: int) -> int:
        """The most bytes of a slice of ``count`` elements, header included; for most codecs, exactly as many."""

    def expected_bytes(self, count: int) -> int:
        """What a slice of ``count`` elements usually takes: less than ``payload_bytes`` where sizes vary."""
        return self.payload_bytes(count)

    @abstractmethod
    def squared_norm(self, payload: Buffer, count: int) -> float:
        """‖D(payload)‖², the same fp64 value on every node (DESIGN §5). Checks the payload first."""

    def header(self, count: int) -> bytes:
        """The first ``HEADER_BYTES`` of a payload of ``count`` elements."""
        return _HEADER.pack(_MAGIC, _VERSION, self.name.encode(), count)


class DefinedCodec(Codec):
    """A codec by its quantizer Q and its decoder D, in PyTorch; what is around them is the same for all."""

    def encode(self, base: Tensor, local: Tensor, residual: Tensor | None, beta: float) -> bytes:
        delta = torch.sub(base, local)
        if residual is not None:
            delta = residual.mul(beta).add_(delta)
        require_finite(delta)
        body = self._quantize(delta)
        if residual is not None:
            residual.copy_(delta.sub_(self._values(memoryview(body), delta.numel())))
        return self.header(delta.numel()) + body

    def decode_add(self, payload: Buffer, weight: float, out: Tensor) -> None:
        out.add_(self._values(self.check(payload, out.numel()), out.numel()).mul_(weight))

    def check(self, payload: Buffer, count: int) -> memoryview:
        body = self.unwrap(payload, count)
        self._check_body(body, count)
        return body

    @abstractmethod
    def _quantize(self, values: Tensor) -> bytes:
        """Q: finite fp32 ``[n]`` to the body's bytes."""

    @abstractmethod
    def _values(self, body: memoryview, count: int) -> Tensor:
        """D: a checked body to a new fp32 tensor ``[count]``."""

    @abstractmethod
    def _check_body(self, body: memoryview, count: int) -> None:
        """Raise :class:`MalformedPayload` where the body, of the right size, cannot be decoded safely."""


def require_finite(values: Tensor) -> None:
    """Raise :class:`NonFinite` with the first position of a NaN or an infinity."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        raise NonFinite(int(torch.argmin(finite.to(torch.uint8))))
