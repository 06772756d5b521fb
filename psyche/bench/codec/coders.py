"""One interface over psyche's codecs and outer steps and those of other systems."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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


class Coder(ABC):
    """One way to send a pseudo-gradient. Tensors are contiguous fp32 ``[n]`` on ``device``, n a multiple of 4096."""

    system: str
    codec: str
    """Name of the codec in its system."""
    backend: str
    error_feedback: bool
    """Whether ``encode`` also reads and writes a residual."""
    sparse: bool = False
    """Whether ``decode_add`` touches the kept coordinates only."""
    device: str = "cpu"

    @abstractmethod
    def encode(self, base: Tensor, local: Tensor, residual: Tensor | None) -> Any:
        """Return the payload of base − local, in the form in which this system leaves it."""

    @abstractmethod
    def decode_add(self, payload: Any, weight: float, out: Tensor) -> None:
        """``out += weight · D(payload)``."""

    @abstractmethod
    def payload_bytes(self, payload: Any) -> int:
        """Bytes that would be sent."""


class PsycheCoder(Coder):
    """One of psyche's codecs on one backend, with the codec's usual error feedback."""

    system = "psyche"

    def __init__(self, backend: Backend, name: str) -> None:
        self.codec, self.backend, self.device = name, backend.name, backend.device.type
        self._codec = backend.codec(name)
        self._beta = CODECS[name].error_feedback
        self.error_feedback = self._codec.error_feedback
        self.sparse = CODECS[name].sparse

    def encode(self, base: Tensor, local: Tensor, residual: Tensor | None) -> Any:
        return self._codec.encode(base, local, residual, self._beta)

    def decode_add(self, payload: Any, weight: float, out: Tensor) -> None:
        self._codec.decode_add(payload, weight, out)

    def payload_bytes(self, payload: Any) -> int:
        return len(payload)


class Stepper(ABC):
    """One implementation of the outer step with the copy of the new θ to the local parameters."""

    system: str
    codec: str | None
    """Name in its system. ``None`` for psyche's outer step."""
    backend: str
    device: str = "cpu"

    @abstractmethod
    def bind(self, theta: Tensor, momentum: Tensor, gradient: Tensor, local: Tensor) -> Work:
        """Return the step on these tensors, all fp32 ``[n]``, as repeatable work."""


class PsycheStepper(Stepper):
    """The outer step of one backend, slice by slice as in a replica."""

    system, codec = "psyche", None

    def __init__(self, backend: Backend) -> None:
        self.backend, self.device = backend.name, backend.device.type
        self._step = backend.outer_step

    def bind(self, theta: Tensor, momentum: Tensor, gradient: Tensor, local: Tensor) -> Work:
        def work() -> None:
            for part in parts(theta.numel()):
                self._step(theta[part], momentum[part], gradient[part], OuterSettings(LR, MOMENTUM), local=local[part])

        return work


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
