"""One interface over psyche's codecs and outer steps and those of other systems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psyche.errors import PsycheError
from psyche.numerics.backends import cuda_device
from psyche.numerics.backends.base import Backend
from psyche.numerics.backends.selection import available_backends, backend_on
from psyche.numerics.codecs.registry import CODECS
from psyche.numerics.flat import SLICE
from psyche.numerics.outer import OuterSettings

LR, MOMENTUM = 0.7, 0.9
"""Settings of the outer step (DiLoCo, arXiv 2311.08105). Its time does not depend on them."""

Work = Callable[[], object]
"""One repetition of the work that is timed."""

USUAL_CODECS = tuple(name for name in CODECS if not name.startswith(("topk2-", "topk2e-")))
"""The codecs measured by default: all but the sparse ones of further densities."""


@dataclass(frozen=True)
class Coder:
    """One way to send a pseudo-gradient. Tensors are contiguous fp32 ``[n]`` on ``device``, n a multiple of 4096."""

    system: str
    codec: str
    """Name of the codec in its system."""
    backend: str
    encode: Callable[[Tensor, Tensor, Tensor | None], Any]
    """Takes base, local and residual; returns the payload of base − local, as the system leaves it."""
    decode_add: Callable[[Any, float, Tensor], None]
    """Takes payload, weight and out: ``out += weight · D(payload)``."""
    payload_bytes: Callable[[Any], int]
    """Bytes that would be sent."""
    error_feedback: bool = False
    """Whether ``encode`` also reads and writes a residual."""
    sparse: bool = False
    """Whether ``decode_add`` touches the kept coordinates only."""
    device: str = "cpu"


@dataclass(frozen=True)
class Stepper:
    """One implementation of the outer step with the copy of the new θ to the local parameters."""

    system: str
    codec: str | None
    """Name in its system. ``None`` for psyche's outer step."""
    backend: str
    bind: Callable[[Tensor, Tensor, Tensor, Tensor], Work]
    """Takes θ, momentum, gradient and local parameters, all fp32 ``[n]``; returns the step as repeatable work."""
    device: str = "cpu"


def psyche_coder(backend: Backend, name: str) -> Coder:
    """One of psyche's codecs on one backend, with the codec's usual error feedback."""
    codec, beta = backend.codec(name), CODECS[name].error_feedback
    return Coder(
        system="psyche",
        codec=name,
        backend=backend.name,
        encode=lambda base, local, residual: codec.encode(base, local, residual, beta),
        decode_add=codec.decode_add,
        payload_bytes=len,
        error_feedback=codec.error_feedback,
        sparse=name.startswith("topk"),
        device=backend.device.type,
    )


def psyche_stepper(backend: Backend) -> Stepper:
    """Return the outer step of one backend, slice by slice as in a replica."""

    def bind(theta: Tensor, momentum: Tensor, gradient: Tensor, local: Tensor) -> Work:
        def work() -> None:
            for part in parts(theta.numel()):
                settings = OuterSettings(LR, MOMENTUM)
                backend.outer_step(theta[part], momentum[part], gradient[part], settings, local=local[part])

        return work

    return Stepper("psyche", None, backend.name, bind, backend.device.type)


def parts(count: int) -> list[slice]:
    """Split ``count`` parameters into slices as in a run."""
    return [slice(start, min(start + SLICE, count)) for start in range(0, count, SLICE)]


def backends(wanted: Sequence[str]) -> list[Backend]:
    """Return the backends that work here, or those of them named. Raises :class:`PsycheError` for another name."""
    found = {backend.name: backend for backend in available_backends()}
    if torch.cuda.is_available() and cuda_device.unavailable_reason() is None:
        found["cuda"] = backend_on(torch.device("cuda", torch.cuda.current_device()))
    _require_known("backend", wanted, tuple(found))
    return [backend for name, backend in found.items() if not wanted or name in wanted]


def codec_names(wanted: Sequence[str]) -> list[str]:
    """Return the codecs named, or the usual ones, in psyche's order. Raises :class:`PsycheError` for another name."""
    _require_known("codec", wanted, tuple(CODECS))
    return [name for name in CODECS if name in (wanted or USUAL_CODECS)]


def _require_known(kind: str, wanted: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [name for name in wanted if name not in known]:
        raise PsycheError(f"--{kind} {unknown[0]}: unknown or unavailable here; choose from {', '.join(known)}")
