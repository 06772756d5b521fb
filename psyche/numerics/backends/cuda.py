"""The CUDA backend: kernels/cuda behind the codec interface, for tensors on one GPU (or, in tests, the emulator's).

Encoding and decoding start kernels and return; only what must be known on the host (the bytes of a payload, whether
one was refused) is copied back and waited for.
"""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from psyche.numerics.backends.base import Backend, TorchBackend
from psyche.numerics.backends.launcher import Launcher
from psyche.numerics.codecs.base import HEADER_BYTES, Codec, MalformedPayload, NonFinite
from psyche.numerics.codecs.names import CODECS
from psyche.numerics.codecs.topk2 import TopK2
from psyche.numerics.codecs.topk2e import TopK2e
from psyche.numerics.flat import ALIGNMENT

FINITE = (1 << 63) - 1
"""What a status word holds that names no position."""

WIDE = 16
"""Bytes of one load or store, and hence the alignment of all tensors."""

_REASONS = {
    8: "the header is not that of {name} for {count} elements",
    4: "an index is repeated or out of range, or their number is wrong",
    2: "a code is not one that is ever sent",
    1: "a scale or a level is not one that is ever sent",
}
"""Of kernels/cuda/lanes.cuh, ``Malformed``."""

_TILES = 2048
"""Values of one block of threads, where a warp holds 256."""


def _check_span(name: str) -> int:
    """Values that one block of threads checks: 16 bytes of codes, scales or levels a thread."""
    return {"fp32": 1024, "int8": 4096, "int4": 262144, "int4_32": 65536, "int2": 262144}.get(name, 8 * ALIGNMENT)


class CudaCodec(Codec):
    """A codec whose tensors lie on the launcher's device, 16-byte aligned. The same bits as its definition."""

    backend = "cuda"

    def __init__(self, launcher: Launcher, host: Codec) -> None:
        self._host = host
        self._launcher = launcher
        self.name, self.error_feedback = host.name, host.error_feedback
        self.device = launcher.device
        sparse = isinstance(host, TopK2)
        self._kernel = f"topk2_{host.kept}" if isinstance(host, TopK2) else host.name.replace("-", "_")
        self._encode_span = ALIGNMENT if sparse else 1024 if host.name == "fp32" else _TILES
        self._decode_span = 8 * ALIGNMENT if sparse else 1024 if host.name == "fp32" else _TILES

    # ------------------------------------------------------------------- without waiting for the device

    def encode_into(
        self, base: Tensor, local: Tensor, residual: Tensor | None, beta: float, payload: Tensor, status: Tensor
    ) -> None:
        """:meth:`encode` into ``payload`` (uint8 ``[payload_bytes(n)]``), without a copy or a synchronisation.

        Afterwards ``status`` (int64 ``[1]``) is ``FINITE``, or the first position of a NaN or an infinity; then
        payload and residual are undefined. Raises ``ValueError`` for tensors of the wrong shape, type or place.
        """
        count = local.numel()
        self._require(count, base=base, local=local, residual=residual)
        self._require_bytes(payload, self.payload_bytes(count))
        self._require_word("the status", status, torch.int64)
        status.fill_(FINITE)
        self._launcher.launch("header_write", 1, payload, *self._header_words(count))
        body = payload[HEADER_BYTES:]
        self._launch("encode", self._encode_span, count, base, local, residual, beta, body, count, status)

    def check_into(self, payload: Tensor, count: int, malformed: Tensor) -> None:
        """:meth:`check` of a payload on the device (uint8), without a synchronisation.

        ``malformed`` (int32 ``[1]``) must be 0, and is then another number where the payload is refused.
        """
        self._require_bytes(payload, self.payload_bytes(count))
        self._require_word("the verdict", malformed, torch.int32)
        self._launcher.launch("header_check", 1, payload, *self._header_words(count), malformed)
        self._launch("check", _check_span(self._kernel), count, payload[HEADER_BYTES:], count, malformed)

    def decode_add_into(self, payload: Tensor, weight: float, out: Tensor, malformed: Tensor) -> None:
        """:meth:`decode_add` of a payload on the device, without a synchronisation.

        Writes nothing where the payload is refused: see :meth:`check_into` for ``malformed``.
        """
        self.check_into(payload, out.numel(), malformed)
        self.add_checked_into(payload, weight, out, malformed)

    def add_checked_into(self, payload: Tensor, weight: float, out: Tensor, malformed: Tensor) -> None:
        """The second half of :meth:`decode_add_into`, for a payload and a verdict that :meth:`check_into` has seen."""
        count = out.numel()
        self._require(count, out=out)
        self._require_bytes(payload, self.payload_bytes(count))
        self._require_word("the verdict", malformed, torch.int32)
        body = payload[HEADER_BYTES:]
        self._launch("decode_add", self._decode_span, count, body, weight, out, count, malformed)

    # ----------------------------------------------------------------------------- the codec interface

    def encode(self, base: Tensor, local: Tensor, residual: Tensor | None, beta: float) -> bytes:
        """As :class:`Codec` says, with one copy back from the device: payload and status word together."""
        size = self.payload_bytes(local.numel())
        padded = -(-size // WIDE) * WIDE
        result = torch.empty(padded + 8, dtype=torch.uint8, device=self._launcher.device)
        self.encode_into(base, local, residual, beta, result[:size], result[padded:].view(torch.int64))
        copied = result.cpu().numpy()
        position = int.from_bytes(copied[padded:].tobytes(), "little")
        if position != FINITE:
            raise NonFinite(position)
        return copied[:size].tobytes()

    def decode_add(self, payload: Buffer | Tensor, weight: float, out: Tensor) -> None:
        """As :class:`Codec` says. ``payload`` may be a uint8 tensor on the device."""
        malformed = torch.zeros(1, dtype=torch.int32, device=self._launcher.device)
        self.decode_add_into(self._on_device(payload, out.numel()), weight, out, malformed)
        self._raise_if(malformed, out.numel())

    def check(self, payload: Buffer, count: int) -> memoryview:
        malformed = torch.zeros(1, dtype=torch.int32, device=self._launcher.device)
        self.check_into(self._on_device(payload, count), count, malformed)
        self._raise_if(malformed, count)
        return self.unwrap(payload, count)

    def payload_bytes(self, count: int) -> int:
        return self._host.payload_bytes(count)

    def squared_norm(self, payload: Buffer, count: int) -> float:
        """On the host: a sequential sum in fp64 of as many terms as there are blocks."""
        return self._host.squared_norm(payload, count)

    # --------------------------------------------------------------------------------------- our own

    def _launch(self, kernel: str, span: int, count: int, *arguments: Tensor | int | float | None) -> None:
        if count > 0:
            self._launcher.launch(f"{self._kernel}_{kernel}", -(-count // span), *arguments)

    def _header_words(self, count: int) -> tuple[int, ...]:
        return struct.unpack("<4Q", self.header(count))

    def _require(self, count: int, **tensors: Tensor | None) -> None:
        if count % ALIGNMENT != 0:
            raise ValueError(f"{count} elements: a range is a multiple of {ALIGNMENT}")
        require_flat(self._launcher.device, count, **tensors)

    def _require_word(self, name: str, word: Tensor, dtype: torch.dtype) -> None:
        if word.dtype != dtype or word.numel() != 1 or word.device != self._launcher.device:
            raise ValueError(f"{name} is one {dtype} on {self._launcher.device}")

    def _require_bytes(self, payload: Tensor, size: int) -> None:
        if payload.dtype != torch.uint8 or payload.device != self._launcher.device or not payload.is_contiguous():
            raise ValueError(f"a payload is contiguous uint8 on {self._launcher.device}")
        if payload.numel() != size:
            raise MalformedPayload(f"{payload.numel()} bytes where {size} were due")
        if payload.data_ptr() % WIDE != 0:
            raise ValueError(f"a payload on the device starts on a multiple of {WIDE} bytes")

    def _on_device(self, payload: Buffer | Tensor, count: int) -> Tensor:
        if isinstance(payload, Tensor):
            return payload
        view = memoryview(payload).cast("B")
        if view.nbytes != self.payload_bytes(count):  # before so much is allocated
            raise MalformedPayload(f"{view.nbytes} bytes where {self.payload_bytes(count)} were due")
        on_gpu = self._launcher.device.type == "cuda"
        staged = torch.empty(view.nbytes, dtype=torch.uint8, pin_memory=on_gpu)
        staged.numpy()[:] = np.frombuffer(view, np.uint8)
        return staged.to(self._launcher.device, non_blocking=True)

    def _raise_if(self, malformed: Tensor, count: int) -> None:
        found = int(malformed.item())
        for bit, reason in _REASONS.items():
            if found & bit:
                raise MalformedPayload(reason.format(name=self.name, count=count))


class RecodedTopK2(TopK2e):
    """``topk2e``: the device makes and reads the fixed format, the host codes it."""

    backend = "cuda"

    def __init__(self, fixed: CudaCodec, host: TopK2e) -> None:
        super().__init__(host.format.kept, fixed)
        self._host = host
        self.device = fixed.device

    def expand(self, payload: Buffer, count: int) -> bytes:
        return self._host.expand(payload, count)

    def compress(self, body: memoryview) -> bytes:
        return self._host.compress(body)

    def check(self, payload: Buffer, count: int) -> memoryview:
        return self._host.check(payload, count)

    def squared_norm(self, payload: Buffer, count: int) -> float:
        return self._host.squared_norm(payload, count)


class CudaBackend(Backend):
    """All codecs and the outer step on one device."""

    name = "cuda"

    def __init__(self, launcher: Launcher, host: Backend | None = None) -> None:
        """``host`` does what stays on the CPU, entropy coding and norms: PyTorch's definitions by default."""
        host = TorchBackend() if host is None else host
        self._launcher = launcher
        self.detail, self.device = launcher.detail, launcher.device
        self._codecs: dict[str, Codec] = {}
        for name in CODECS:
            if name.startswith("topk2e"):
                fixed = self._codecs[name.replace("topk2e", "topk2")]
                coder = host.codec(name)
                assert isinstance(fixed, CudaCodec)
                assert isinstance(coder, TopK2e)
                self._codecs[name] = RecodedTopK2(fixed, coder)
            else:
                self._codecs[name] = CudaCodec(launcher, host.codec(name))

    def codec(self, name: str) -> Codec:
        return self._codecs[name]

    def outer_step(
        self, theta: Tensor, momentum: Tensor, gradient: Tensor, *, lr: float, mu: float, local: Tensor | None = None
    ) -> None:
        """All ``[n]`` fp32, contiguous, 16-byte aligned, n a multiple of 4. Does not wait for the device."""
        count = theta.numel()
        require_flat(self._launcher.device, count, theta=theta, momentum=momentum, gradient=gradient, local=local)
        if count % 4 != 0:
            raise ValueError(f"{count} elements: the outer step takes four at a time")
        if count > 0:
            blocks = -(-count // 1024)
            self._launcher.launch("outer_step", blocks, theta, momentum, gradient, lr, mu, local, count)


def require_flat(device: torch.device, count: int, **tensors: Tensor | None) -> None:
    """Raise ``ValueError``, naming the tensor, unless all are contiguous fp32 ``[count]`` on ``device``, aligned."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or tensor.shape != (count,) or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous fp32 of shape [{count}]")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the kernels run on {device}")
        if tensor.data_ptr() % WIDE != 0:
            raise ValueError(f"{name} must start on a multiple of {WIDE} bytes")
