"""The backends that work on this machine, fastest first."""

from __future__ import annotations

import torch

from psyche.errors import PsycheError
from psyche.numerics.backends.base import Backend, TorchBackend


def available_backends() -> list[Backend]:
    """Backends for CPU tensors, fastest first. PyTorch, the last one, is always available."""
    backends: list[Backend] = [TorchBackend()]
    try:
        from psyche.numerics.backends.native import NativeBackend
    except ImportError:  # installed without a C++ compiler
        return backends
    return [NativeBackend(), *backends]


def fastest_backend() -> Backend:
    """Return the fastest backend for CPU tensors."""
    return available_backends()[0]


def backend_on(device: torch.device) -> Backend:
    """Return the fastest backend for tensors on ``device``. Raises :class:`PsycheError` where kernels cannot run on
    it."""
    if device.type == "cpu":
        return fastest_backend()
    from psyche.numerics.backends.cuda import CudaBackend
    from psyche.numerics.backends.cuda_device import DeviceLauncher, unavailable_reason

    if (reason := unavailable_reason()) is not None:
        raise PsycheError(f"CUDA kernels cannot run on {device}: {reason}")
    return CudaBackend(DeviceLauncher(device), host=fastest_backend())
