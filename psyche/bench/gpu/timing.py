"""Time every kernel against a device copy of as many bytes as it moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from psyche.bench.gpu.equality import BETA, LR, MU, OUTER, WEIGHT
from psyche.bench.gpu.machine import Machine
from psyche.numerics.backends.cuda import CudaBackend, CudaCodec
from psyche.numerics.codecs.registry import CODECS
from psyche.numerics.codecs.registry import codec as definition
from psyche.numerics.codecs.topk2 import TopK2
from psyche.numerics.flat import ALIGNMENT
from psyche.numerics.outer import OuterSettings

BAR = 0.85
"""Share of the copy's bandwidth that a kernel should reach."""

SECTOR = 32
"""Least bytes of a scattered access, on all of NVIDIA's cards since 2012."""


@dataclass(frozen=True)
class Timing:
    """One kernel at one size."""

    codec: str
    """Name of the codec, or ``outer step``."""
    step: str
    """``encode``, ``check`` or ``decode_add``; ``step`` of the outer step."""
    elements: int
    bytes_moved: int
    """Bytes read and written if every value is moved once."""
    seconds: float
    copy_seconds: float
    """Time of a device-to-device copy that reads and writes as many bytes."""

    @property
    def gbps(self) -> float:
        """fp32 input, GB/s."""
        return 4 * self.elements / self.seconds / 1e9

    @property
    def copy_gbps(self) -> float:
        """Bytes that the copy reads and writes, GB/s."""
        return self.bytes_moved / self.copy_seconds / 1e9

    @property
    def share_of_copy(self) -> float:
        return self.copy_seconds / self.seconds


TIMED = (*(name for name in CODECS if not name.startswith("topk2e")), OUTER)
"""Everything that has kernels of its own."""


def timings(machine: Machine, name: str) -> Iterator[Timing]:
    """Time the kernels of a codec, or of the outer step."""
    backend = CudaBackend(machine.launcher)
    if name == OUTER:
        yield _of_outer_step(machine, backend)
        return
    codec = backend.codec(name)
    assert isinstance(codec, CudaCodec)
    yield from _of_codec(machine, codec)


def _of_codec(machine: Machine, codec: CudaCodec) -> Iterator[Timing]:
    count, device = machine.elements, machine.launcher.device
    size = codec.payload_bytes(count)
    base = torch.randn(count, device=device)
    local = base + 1e-3 * torch.randn(count, device=device)
    residual = torch.zeros(count, device=device) if codec.error_feedback else None
    payload = torch.empty(size, dtype=torch.uint8, device=device)
    status = torch.empty(1, dtype=torch.int64, device=device)
    malformed = torch.zeros(1, dtype=torch.int32, device=device)

    streams = 4 if residual is not None else 2  # base, local, and e twice
    encode = partial(codec.encode_into, base, local, residual, BETA, payload, status)
    yield _timed(machine, codec.name, "encode", 4 * streams * count + size, encode)
    check = partial(codec.check_into, payload, count, malformed)
    yield _timed(machine, codec.name, "check", _checked_bytes(codec, count), check)
    add = partial(codec.add_checked_into, payload, WEIGHT, base, malformed)
    yield _timed(machine, codec.name, "decode_add", size + _accumulated_bytes(codec, count), add)


def _of_outer_step(machine: Machine, backend: CudaBackend) -> Timing:
    count, device = machine.elements, machine.launcher.device
    theta, momentum, gradient = (torch.randn(count, device=device) for _ in range(3))
    local = torch.empty(count, device=device)
    step = partial(backend.outer_step, theta, momentum, gradient, OuterSettings(LR, MU), local=local)
    return _timed(machine, OUTER, "step", 4 * 6 * count, step)


def _checked_bytes(codec: CudaCodec, count: int) -> int:
    """Return bytes checked: scales or levels; the whole payload if codes can be invalid, too."""
    size = codec.payload_bytes(count)
    codes = {"int4": count // 2, "int4-32": count // 2, "int2": count // 4}
    return size - codes.get(codec.name, 0)


def _accumulated_bytes(codec: CudaCodec, count: int) -> int:
    """Return bytes of the sum read and written: all of it, or a sector for each kept value."""
    defined = definition(codec.name)
    if not isinstance(defined, TopK2):
        return 8 * count
    return min(2 * SECTOR * defined.kept * (count // ALIGNMENT), 8 * count)


def _timed(machine: Machine, codec: str, step: str, moved: int, run: Callable[[], object]) -> Timing:
    source = torch.empty(moved // 2, dtype=torch.uint8, device=machine.launcher.device)
    target = torch.empty_like(source)
    copy_seconds = machine.seconds(partial(target.copy_, source))
    return Timing(codec, step, machine.elements, moved, machine.seconds(run), copy_seconds)
