"""Codecs of other systems, called as an application that sends pseudo-gradients would call them.

None has error feedback or fuses the neighbouring operations: encoding is the subtraction base − local followed by the
system's quantizer; decode-accumulate is its dequantizer followed by an addition. hivemind produces the bytes to send;
the others produce tensors, whose serialisation is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psyche.bench.codec.coders import LR, MOMENTUM, Coder, Stepper, Work

CHUNK, KEPT = 4096, 64

Quantize = Callable[[Tensor], Any]
"""Quantizes fp32 ``[n]``, which may be overwritten."""
Dequantize = Callable[[Any], Tensor]
"""Returns fp32 ``[n]``."""


def rivals() -> tuple[list[Coder], list[str]]:
    """Return the codecs of all installed systems, and a sentence for each system that is missing."""
    found: list[Coder] = []
    missing = []
    systems = {"hivemind": _hivemind, "bitsandbytes": _bitsandbytes, "torchao": _torchao, "pytorch": _pytorch}
    for system, make in systems.items():
        try:
            found += make()
        except (ImportError, OSError) as error:  # OSError: one of its shared libraries cannot be loaded
            how = "make bench-codec installs it, or pip install -e '.[bench]'"
            missing.append(f"{system} is left out ({error}): {how}")
    return found, missing


def rival_steppers() -> list[Stepper]:
    return [plain_sgd(fused=False), plain_sgd(fused=True)]


def _rival(
    system: str,
    codec: str,
    quantize: Quantize,
    dequantize: Dequantize,
    payload_bytes: Callable[[Any], int] | None = None,
) -> Coder:
    """Return a system's codec. Without ``payload_bytes`` its payload is a sequence of tensors, all of which would be
    sent."""

    def decode_add(payload: Any, weight: float, out: Tensor) -> None:
        out.add_(dequantize(payload), alpha=weight)

    return Coder(
        system,
        codec,
        "cpu",
        encode=lambda base, local, residual: quantize(torch.sub(base, local)),
        decode_add=decode_add,
        payload_bytes=payload_bytes or (lambda payload: sum(tensor.nbytes for tensor in payload)),
    )


def _hivemind() -> Iterable[Coder]:
    """hivemind's codecs through the two functions that its averager calls."""
    from hivemind.compression import deserialize_torch_tensor, quantization, serialize_torch_tensor
    from hivemind.proto.runtime_pb2 import CompressionType

    # hivemind 1.1.12 calls int() on one-element arrays to read a length, which NumPy 2.4 refuses. Patching that call
    # lets its decoder run.
    quantization.int = lambda value: np.asarray(value).item()
    for codec, kind in {
        "Uniform8Bit": "UNIFORM_8BIT",
        "Quantile8Bit": "QUANTILE_8BIT",
        "Float16": "FLOAT16",
        "ScaledFloat16": "MEANSTD_16BIT",
        "Blockwise8Bit": "BLOCKWISE_8BIT",  # needs bitsandbytes
    }.items():
        quantize = partial(serialize_torch_tensor, compression_type=CompressionType.Value(kind), allow_inplace=True)
        yield _rival("hivemind", codec, quantize, deserialize_torch_tensor, lambda payload: len(payload.buffer))


def _bitsandbytes() -> Iterable[Coder]:
    """8-bit dynamic and 4-bit blockwise quantization."""
    from bitsandbytes import functional

    def coder(codec: str, quantize: Quantize, dequantize: Dequantize) -> Coder:
        # The table of values is a constant.
        size: Callable[[Any], int] = lambda payload: int(payload[0].nbytes + payload[1].absmax.nbytes)  # noqa: E731
        return _rival("bitsandbytes", codec, quantize, lambda payload: dequantize(*payload).view(-1), size)

    eight = partial(functional.quantize_blockwise, blocksize=256)
    yield coder("dynamic8-256", eight, functional.dequantize_blockwise)
    for kind in ("nf4", "fp4"):
        four = partial(functional.quantize_4bit, blocksize=64, quant_type=kind)
        yield coder(f"{kind}-64", four, functional.dequantize_4bit)


def _torchao() -> Iterable[Coder]:
    """torchao's affine primitives, and its microscaling formats (OCP MX): blocks of 32 with a shared power of two."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    yield _affine("int8-256", 256, -127, 127)
    yield _affine("int4-128", 128, -8, 7)
    for codec, element in (("mxfp8-32", torch.float8_e4m3fn), ("mxfp4-32", torch.float4_e2m1fn_x2)):
        yield _rival(
            "torchao",
            codec,
            partial(_to_mx, MXTensor, element),
            lambda payload: payload.dequantize(torch.float32).view(-1),
            lambda payload: int(payload.qdata.nbytes + payload.scale.nbytes),
        )


def _to_mx(kind: Any, element: torch.dtype, values: Tensor) -> Any:
    return kind.to_mx(values.view(-1, CHUNK), element, 32)


def _affine(codec: str, block: int, lowest: int, highest: int) -> Coder:
    """Symmetric affine codes with absmax scales; 4-bit codes are packed as an application would."""
    from torchao.quantization import quant_primitives as primitives

    limits, packs, shape = (torch.int8, lowest, highest), highest < 8, (1, block)

    def quantize(values: Tensor) -> Any:
        blocks, symmetric = values.view(-1, block), primitives.MappingType.SYMMETRIC
        scale, zero = primitives.choose_qparams_affine(blocks, symmetric, shape, *limits, eps=1e-30)
        codes = primitives.quantize_affine(blocks, shape, scale, zero, *limits)
        return ((codes[:, ::2] & 15) | (codes[:, 1::2] << 4) if packs else codes), scale

    def dequantize(payload: Any) -> Tensor:
        codes, scale = payload
        if packs:
            codes = torch.stack([codes << 4 >> 4, codes >> 4], dim=2).view(-1, block)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        values: Tensor = primitives.dequantize_affine(codes, shape, scale, zero, *limits)
        return values.view(-1)

    return _rival("torchao", codec, quantize, dequantize)


def _pytorch() -> Iterable[Coder]:
    yield plain_int8()
    yield plain_topk()


def plain_int8() -> Coder:
    """Blockwise absmax int8 in plain PyTorch."""

    def quantize(values: Tensor) -> Any:
        blocks = values.view(-1, 256)
        scale = blocks.abs().amax(dim=1, keepdim=True).div_(127).clamp_(min=1e-30)
        return (blocks / scale).round_().to(torch.int8), scale

    return _rival("pytorch", "int8-256", quantize, lambda payload: (payload[0] * payload[1]).view(-1))


def plain_topk() -> Coder:
    """Return the 64 largest magnitudes of each 4096 values in plain PyTorch: fp16 with 16-bit indices."""

    def quantize(values: Tensor) -> Any:
        chunks = values.view(-1, CHUNK)
        indices = chunks.abs().topk(KEPT, dim=1, sorted=False).indices
        return chunks.gather(1, indices).to(torch.float16), indices.to(torch.int16)

    def decode_add(payload: Any, weight: float, out: Tensor) -> None:
        values, indices = payload
        out.view(-1, CHUNK).scatter_add_(1, indices.long(), values.float() * weight)

    dense = _rival("pytorch", f"topk-{KEPT}", quantize, lambda payload: payload[0])
    return replace(dense, decode_add=decode_add, sparse=True)


def plain_sgd(*, fused: bool) -> Stepper:
    """``torch.optim.SGD`` with Nesterov momentum on the whole vector, then a copy."""

    def bind(theta: Tensor, momentum: Tensor, gradient: Tensor, local: Tensor) -> Work:
        theta.grad = gradient
        optimizer = torch.optim.SGD([theta], lr=LR, momentum=MOMENTUM, nesterov=True, fused=fused)
        optimizer.state[theta]["momentum_buffer"] = momentum

        def work() -> None:
            optimizer.step()
            local.copy_(theta)

        return work

    return Stepper("pytorch", "SGD, fused" if fused else "SGD", "cpu", bind)
