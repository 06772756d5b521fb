"""Codecs of other systems, called as an application that sends pseudo-gradients would call them.

None has error feedback or fuses the neighbouring operations: encoding is the subtraction base − local followed by the
system's quantizer; decode-accumulate is its dequantizer followed by an addition. hivemind produces the bytes to send;
the others produce tensors, whose serialisation is not timed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psyche.bench.codec.coders import LR, MOMENTUM, Coder, Stepper, Work

CHUNK, KEPT = 4096, 64


class RivalCoder(Coder):
    """A system with a quantizer and a dequantizer."""

    backend = "cpu"
    error_feedback = False

    def __init__(self, codec: str) -> None:
        self.codec = codec

    def encode(self, base: Tensor, local: Tensor, residual: Tensor | None) -> Any:
        return self.quantize(torch.sub(base, local))

    def decode_add(self, payload: Any, weight: float, out: Tensor) -> None:
        out.add_(self.dequantize(payload), alpha=weight)

    def payload_bytes(self, payload: Any) -> int:
        return sum(tensor.nbytes for tensor in payload)

    @abstractmethod
    def quantize(self, values: Tensor) -> Any:
        """Quantize ``values`` (fp32 ``[n]``), which may be overwritten."""

    @abstractmethod
    def dequantize(self, payload: Any) -> Tensor:
        """Return fp32 ``[n]``."""


class Hivemind(RivalCoder):
    """hivemind's codecs through the two functions that its averager calls."""

    system = "hivemind"

    def __init__(self, codec: str, kind: str) -> None:
        super().__init__(codec)
        import hivemind.compression as compression
        from hivemind.compression import quantization
        from hivemind.proto.runtime_pb2 import CompressionType

        # hivemind 1.1.12 calls int() on one-element arrays to read a length, which NumPy 2.4 refuses. Patching that
        # call lets its decoder run.
        quantization.int = lambda value: np.asarray(value).item()
        self._kind = CompressionType.Value(kind)
        self._serialize = compression.serialize_torch_tensor
        self._deserialize = compression.deserialize_torch_tensor

    def quantize(self, values: Tensor) -> Any:
        return self._serialize(values, self._kind, allow_inplace=True)

    def dequantize(self, payload: Any) -> Tensor:
        values: Tensor = self._deserialize(payload)
        return values

    def payload_bytes(self, payload: Any) -> int:
        return len(payload.buffer)


class Bitsandbytes(RivalCoder):
    """8-bit dynamic or 4-bit blockwise quantization."""

    system = "bitsandbytes"

    def __init__(self, codec: str, block: int, kind: str | None = None) -> None:
        super().__init__(codec)
        from bitsandbytes import functional

        self._block, self._options = block, {"quant_type": kind} if kind else {}
        self._quantize = functional.quantize_4bit if kind else functional.quantize_blockwise
        self._dequantize = functional.dequantize_4bit if kind else functional.dequantize_blockwise

    def quantize(self, values: Tensor) -> Any:
        return self._quantize(values, blocksize=self._block, **self._options)

    def dequantize(self, payload: Any) -> Tensor:
        values: Tensor = self._dequantize(*payload)
        return values.view(-1)

    def payload_bytes(self, payload: Any) -> int:
        codes, state = payload
        return int(codes.nbytes + state.absmax.nbytes)  # the table of values is a constant


class TorchaoAffine(RivalCoder):
    """torchao's symmetric affine primitives with absmax scales; 4-bit codes are packed as an application would."""

    system = "torchao"

    def __init__(self, codec: str, block: int, lowest: int, highest: int) -> None:
        super().__init__(codec)
        from torchao.quantization import quant_primitives

        self._primitives = quant_primitives
        self._block, self._range = block, (torch.int8, lowest, highest)
        self._packs = highest < 8

    def quantize(self, values: Tensor) -> Any:
        blocks, shape = values.view(-1, self._block), (1, self._block)
        symmetric = self._primitives.MappingType.SYMMETRIC
        scale, zero = self._primitives.choose_qparams_affine(blocks, symmetric, shape, *self._range, eps=1e-30)
        codes = self._primitives.quantize_affine(blocks, shape, scale, zero, *self._range)
        if self._packs:
            codes = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
        return codes, scale

    def dequantize(self, payload: Any) -> Tensor:
        codes, scale = payload
        if self._packs:
            codes = torch.stack([codes << 4 >> 4, codes >> 4], dim=2).view(-1, self._block)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        values: Tensor = self._primitives.dequantize_affine(codes, (1, self._block), scale, zero, *self._range)
        return values.view(-1)


class TorchaoMx(RivalCoder):
    """torchao's microscaling formats (OCP MX): blocks of 32 with a shared power of two."""

    system = "torchao"

    def __init__(self, codec: str, element: torch.dtype) -> None:
        super().__init__(codec)
        from torchao.prototype.mx_formats.mx_tensor import MXTensor

        self._element, self._convert = element, MXTensor.to_mx

    def quantize(self, values: Tensor) -> Any:
        return self._convert(values.view(-1, CHUNK), self._element, 32)

    def dequantize(self, payload: Any) -> Tensor:
        values: Tensor = payload.dequantize(torch.float32)
        return values.view(-1)

    def payload_bytes(self, payload: Any) -> int:
        return int(payload.qdata.nbytes + payload.scale.nbytes)


class PlainInt8(RivalCoder):
    """Blockwise absmax int8 in plain PyTorch."""

    system = "pytorch"

    def quantize(self, values: Tensor) -> Any:
        blocks = values.view(-1, 256)
        scale = blocks.abs().amax(dim=1, keepdim=True).div_(127).clamp_(min=1e-30)
        return (blocks / scale).round_().to(torch.int8), scale

    def dequantize(self, payload: Any) -> Tensor:
        codes, scale = payload
        values: Tensor = (codes * scale).view(-1)
        return values


class PlainTopK(RivalCoder):
    """The 64 largest magnitudes of each 4096 values in plain PyTorch: fp16 with 16-bit indices."""

    system = "pytorch"
    sparse = True

    def quantize(self, values: Tensor) -> Any:
        chunks = values.view(-1, CHUNK)
        indices = chunks.abs().topk(KEPT, dim=1, sorted=False).indices
        return chunks.gather(1, indices).to(torch.float16), indices.to(torch.int16)

    def dequantize(self, payload: Any) -> Tensor:
        values, indices = payload
        return torch.zeros(len(values), CHUNK).scatter_(1, indices.long(), values.float()).view(-1)

    def decode_add(self, payload: Any, weight: float, out: Tensor) -> None:
        values, indices = payload
        out.view(-1, CHUNK).scatter_add_(1, indices.long(), values.float() * weight)


class PlainSgd(Stepper):
    """``torch.optim.SGD`` with Nesterov momentum on the whole vector, then a copy."""

    system, backend = "pytorch", "cpu"

    def __init__(self, *, fused: bool) -> None:
        self.codec = "SGD, fused" if fused else "SGD"
        self._fused = fused

    def bind(self, theta: Tensor, momentum: Tensor, gradient: Tensor, local: Tensor) -> Work:
        theta.grad = gradient
        optimizer = torch.optim.SGD([theta], lr=LR, momentum=MOMENTUM, nesterov=True, fused=self._fused)
        optimizer.state[theta]["momentum_buffer"] = momentum

        def work() -> None:
            optimizer.step()
            local.copy_(theta)

        return work


def rivals() -> tuple[list[Coder], list[str]]:
    """Return the codecs of all installed systems, and a sentence for each system that is missing."""
    found: list[Coder] = []
    absent = []
    for system, make in _SYSTEMS.items():
        try:
            found += make()
        except (ImportError, OSError) as error:  # OSError: one of its shared libraries cannot be loaded
            absent.append(f"{system} is left out ({error}): make bench-codec installs it, or pip install -e '.[bench]'")
    return found, absent


def rival_steppers() -> list[Stepper]:
    return [PlainSgd(fused=False), PlainSgd(fused=True)]


def _hivemind() -> Iterable[Coder]:
    yield Hivemind("Uniform8Bit", "UNIFORM_8BIT")
    yield Hivemind("Quantile8Bit", "QUANTILE_8BIT")
    yield Hivemind("Float16", "FLOAT16")
    yield Hivemind("ScaledFloat16", "MEANSTD_16BIT")
    yield Hivemind("Blockwise8Bit", "BLOCKWISE_8BIT")  # needs bitsandbytes


def _bitsandbytes() -> Iterable[Coder]:
    yield Bitsandbytes("dynamic8-256", 256)
    yield Bitsandbytes("nf4-64", 64, "nf4")
    yield Bitsandbytes("fp4-64", 64, "fp4")


def _torchao() -> Iterable[Coder]:
    yield TorchaoAffine("int8-256", 256, -127, 127)
    yield TorchaoAffine("int4-128", 128, -8, 7)
    yield TorchaoMx("mxfp8-32", torch.float8_e4m3fn)
    yield TorchaoMx("mxfp4-32", torch.float4_e2m1fn_x2)


def _pytorch() -> Iterable[Coder]:
    yield PlainInt8("int8-256")
    yield PlainTopK("topk-64")


_SYSTEMS: dict[str, Callable[[], Iterable[Coder]]] = {
    "hivemind": _hivemind,
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "pytorch": _pytorch,
}
