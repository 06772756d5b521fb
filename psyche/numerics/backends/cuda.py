"""The CUDA backend: kernels/cuda behind the codec interface, for tensors on one GPU (in tests, on the emulator).

Encoding and decoding launch kernels and return. Only what the host needs (the bytes of a payload, whether one was
rejected) is copied back and waited for.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from psyche.numerics.backends.base import Backend, TorchBackend
from psyche.numerics.backends.launcher import Launcher
from psyche.numerics.codecs.base import HEADER_BYTES, Codec, MalformedPayload, NonFinite
from psyche.numerics.codecs.topk2e import TopK2e
from psyche.numerics.flat import ALIGNMENT
from psyche.numerics.outer import OuterSettings

FINITE = (1 << 63) - 1
"""The value of a status word that records no position."""

WIDE = 16
"""Bytes of one load or store, and hence the alignment of all tensors."""

_REASONS = {
    8: "the header is not that of {name} for {count} elements",
    4: "an index is repeated or out of range, or their number is wrong",
    2: "a code is never produced by an encoder",
    1: "a scale or a level is never produced by an encoder",
}
"""The bits of ``Malformed`` in kernels/cuda/lanes.cuh."""


class _Kernels(NamedTuple):
    """The kernels of one codec, and how many values one block of threads handles in each."""

    prefix: str
    encode_span: int
    decode_span: int
    check_span: int
    """16 bytes of codes, scales or levels per thread."""


_KERNELS = {
    "fp32": _Kernels("fp32", 1024, 1024, 1024),
    "int8": _Kernels("int8", 2048, 2048, 4096),
    "int4": _Kernels("int4", 2048, 2048, 262144),
    "int4-32": _Kernels("int4_32", 2048, 2048, 65536),
    "int2": _Kernels("int2", 2048, 2048, 262144),
    "topk2": _Kernels("topk2_64", ALIGNMENT, 8 * ALIGNMENT, 8 * ALIGNMENT),
    "topk2-256": _Kernels("topk2_256", ALIGNMENT, 8 * ALIGNMENT, 8 * ALIGNMENT),
    "topk2-512": _Kernels("topk2_512", ALIGNMENT, 8 * ALIGNMENT, 8 * ALIGNMENT),
}
"""Kernels by codec name. A codec without one runs on the host: see :class:`HostCodec`."""


class CudaCodec(Codec):
    """A codec whose tensors are on the launcher's device, 16-byte aligned. Computes the bits of its definition."""

    backend = "cuda"

    def __init__(self, launcher: Launcher, host: Codec) -> None:
        """``host`` is the same codec on the CPU. Raises ``KeyError`` where kernels/cuda does not implement it."""
        self._kernels = _KERNELS[host.name]
        self._host = host
        self._launcher = launcher
        self.name, self.error_feedback = host.name, host.error_feedback
        self.device = launcher.device

    # ------------------------------------------------------------------- asynchronous: no wait for the device

    def encode_into(
        self, base: Tensor, local: Tensor, residual: Tensor | None, beta: float, payload: Tensor, status: Tensor
    ) -> None:
        """Encode into ``payload`` (uint8 ``[payload_bytes(n)]``), without a copy or a synchronisation.

        Sets ``status`` (int64 ``[1]``) to ``FINITE``, or to the first position of a NaN or an infinity; in that case
        payload and residual are undefined. Raises ``ValueError`` for a tensor of wrong shape, dtype or device.
        """
        count = local.numel()
        self._require(count, base=base, local=local, residual=residual)
        self._require_bytes(payload, self.payload_bytes(count))
        self._require_word("status", status, torch.int64)
        status.fill_(FINITE)
        self._launcher.launch("header_write", 1, payload, *self._header_words(count))
        body = payload[HEADER_BYTES:]
        self._launch("encode", self._kernels.encode_span, count, base, local, residual, beta, body, count, status)

    def check_into(self, payload: Tensor, count: int, malformed: Tensor) -> None:
        """Check a payload on the device (uint8), without a synchronisation.

        ``malformed`` (int32 ``[1]``) must be 0 beforehand; it is nonzero afterwards if the payload is rejected.
        """
        self._require_bytes(payload, self.payload_bytes(count))
        self._require_word("malformed", malformed, torch.int32)
        self._launcher.launch("header_check", 1, payload, *self._header_words(count), malformed)
        self._launch("check", self._kernels.check_span, count, payload[HEADER_BYTES:], count, malformed)

    def decode_add_into(self, payload: Tensor, weight: float, out: Tensor, malformed: Tensor) -> None:
        """Check, decode and add a payload on the device, without a synchronisation.

        Writes nothing if the payload is rejected; see :meth:`check_into` for ``malformed``.
        """
        self.check_into(payload, out.numel(), malformed)
        self.add_checked_into(payload, weight, out, malformed)

    def add_checked_into(self, payload: Tensor, weight: float, out: Tensor, malformed: Tensor) -> None:
        """Decode and add a payload that :meth:`check_into` has checked, unless ``malformed`` is nonzero."""
        count = out.numel()
        self._require(count, out=out)
        self._require_bytes(payload, self.payload_bytes(count))
        self._require_word("malformed", malformed, torch.int32)
        body = payload[HEADER_BYTES:]
        self._launch("decode_add", self._kernels.decode_span, count, body, weight, out, count, malformed)

    # ----------------------------------------------------------------------------- the codec interface

    def encode(self, base: Tensor, local: Tensor, residual: Tensor | None, beta: float) -> bytes:
        """See :class:`Codec`. Payload and status word come back from the device in one copy."""
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
        """See :class:`Codec`. ``payload`` may be a uint8 tensor on the device."""
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
        """Computed on the host: a sequential fp64 sum with one term per block."""
        return self._host.squared_norm(payload, count)

    # --------------------------------------------------------------------------------------- helpers

    def _launch(self, kernel: str, span: int, count: int, *arguments: Tensor | int | float | None) -> None:
        if count > 0:
            self._launcher.launch(f"{self._kernels.prefix}_{kernel}", -(-count // span), *arguments)

    def _header_words(self, count: int) -> tuple[int, ...]:
        return struct.unpack("<4Q", self.header(count))

    def _require(self, count: int, **tensors: Tensor | None) -> None:
        if count % ALIGNMENT != 0:
            raise ValueError(f"{count} elements: the size of a range must be a multiple of {ALIGNMENT}")
        require_flat(self._launcher.device, count, **tensors)

    def _require_word(self, name: str, word: Tensor, dtype: torch.dtype) -> None:
        if word.dtype != dtype or word.numel() != 1 or word.device != self._launcher.device:
            raise ValueError(f"{name} must be one {dtype} on {self._launcher.device}")

    def _require_bytes(self, payload: Tensor, size: int) -> None:
        if payload.dtype != torch.uint8 or payload.device != self._launcher.device or not payload.is_contiguous():
            raise ValueError(f"a payload must be contiguous uint8 on {self._launcher.device}")
        if payload.numel() != size:
            raise MalformedPayload(f"payload of {payload.numel()} bytes, expected {size}")
        if payload.data_ptr() % WIDE != 0:
            raise ValueError(f"a payload on the device must start on a multiple of {WIDE} bytes")

    def _on_device(self, payload: Buffer | Tensor, count: int) -> Tensor:
        if isinstance(payload, Tensor):
            return payload
        view = memoryview(payload).cast("B")
        if view.nbytes != self.payload_bytes(count):  # before anything of that size is allocated
            raise MalformedPayload(f"payload of {view.nbytes} bytes, expected {self.payload_bytes(count)}")
        on_gpu = self._launcher.device.type == "cuda"
        staged = torch.empty(view.nbytes, dtype=torch.uint8, pin_memory=on_gpu)
        staged.numpy()[:] = np.frombuffer(view, np.uint8)
        return staged.to(self._launcher.device, non_blocking=True)

    def _raise_if(self, malformed: Tensor, count: int) -> None:
        found = int(malformed.item())
        for bit, reason in _REASONS.items():
            if found & bit:
                raise MalformedPayload(reason.format(name=self.name, count=count))


class CudaTopK2e(TopK2e):
    """``topk2e``: the device produces and reads ``topk2`` payloads, the host does the entropy coding."""

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


class HostCodec(Codec):
    """A codec without CUDA kernels: computed by the host's backend on copies of the device's tensors."""

    def __init__(self, device: torch.device, host: Codec) -> None:
        self.name, self.error_feedback, self.backend = host.name, host.error_feedback, host.backend
        self.device = device
        self._host = host

    def encode(self, base: Tensor, local: Tensor, residual: Tensor | None, beta: float) -> bytes:
        on_host = None if residual is None else residual.cpu()
        payload = self._host.encode(base.cpu(), local.cpu(), on_host, beta)
        if residual is not None and on_host is not None:
            residual.copy_(on_host)
        return payload

    def decode_add(self, payload: Buffer, weight: float, out: Tensor) -> None:
        on_host = out.cpu()
        self._host.decode_add(payload, weight, on_host)
        out.copy_(on_host)

    def check(self, payload: Buffer, count: int) -> memoryview:
        return self._host.check(payload, count)

    def unwrap(self, payload: Buffer, count: int) -> memoryview:
        return self._host.unwrap(payload, count)

    def payload_bytes(self, count: int) -> int:
        return self._host.payload_bytes(count)

    def expected_bytes(self, count: int) -> int:
        return self._host.expected_bytes(count)

    def squared_norm(self, payload: Buffer, count: int) -> float:
        return self._host.squared_norm(payload, count)


class CudaBackend(Backend):
    """All codecs and the outer step on one device."""

    name = "cuda"

    def __init__(self, launcher: Launcher, host: Backend | None = None) -> None:
        """``host`` (default: PyTorch) does what stays on the CPU: entropy coding, norms, codecs without kernels."""
        self._host = TorchBackend() if host is None else host
        self._launcher = launcher
        self.detail, self.device = launcher.detail, launcher.device
        self._codecs: dict[str, Codec] = {}

    def codec(self, name: str) -> Codec:
        if name not in self._codecs:
            self._codecs[name] = self._accelerated(self._host.codec(name))
        return self._codecs[name]

    def _accelerated(self, host: Codec) -> Codec:
        if isinstance(host, TopK2e) and host.format.name in _KERNELS:
            return CudaTopK2e(CudaCodec(self._launcher, self._host.codec(host.format.name)), host)
        return CudaCodec(self._launcher, host) if host.name in _KERNELS else HostCodec(self.device, host)

    def outer_step(
        self, theta: Tensor, momentum: Tensor, gradient: Tensor, settings: OuterSettings, local: Tensor | None = None
    ) -> None:
        """Apply the outer step without waiting for the device. Tensors are 16-byte aligned, n a multiple of 4."""
        arguments = settings.kernel_arguments
        if arguments is None:
            super().outer_step(theta, momentum, gradient, settings, local)
            return
        count = theta.numel()
        require_flat(self._launcher.device, count, theta=theta, momentum=momentum, gradient=gradient, local=local)
        if count % 4 != 0:
            raise ValueError(f"{count} elements: the outer step needs a multiple of 4")
        if count > 0:
            blocks = -(-count // 1024)
            self._launcher.launch("outer_step", blocks, theta, momentum, gradient, *arguments, local, count)


def require_flat(device: torch.device, count: int, **tensors: Tensor | None) -> None:
    """Raise ``ValueError``, naming the tensor, unless all are contiguous, aligned fp32 ``[count]`` on ``device``."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or tensor.shape != (count,) or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous fp32 of shape [{count}]")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the kernels run on {device}")
        if tensor.data_ptr() % WIDE != 0:
            raise ValueError(f"{name} must start on a multiple of {WIDE} bytes")
