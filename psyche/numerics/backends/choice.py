"""Which backends work on this machine, fastest first."""

from __future__ import annotations

import torch

from psyche.errors import PsycheError
from psyche.numerics.backends.base import Backend, TorchBackend


def available() -> list[Backend]:
    """Backends for tensors on the CPU, fastest first. The last is PyTorch's, which is always there."""
    backends: list[Backend] = [TorchBackend()]
    try:
        from psyche.numerics.backends.native import NativeBackend
    except ImportError:  # installed without a C++ compiler
        return backends
    return [NativeBackend(), *backends]


def best() -> Backend:
    """The fastest backend for tensors on the CPU."""
    return available()[0]


def on(device: torch.device) -> Backend:
    """The fastest backend for tensors on ``device``. Raises :class:`PsycheError` with the mend where there is none."""
    if device.type == "cpu":
        return best()
    from psyche.numerics.backends.cuda import CudaBackend
    from psyche.numerics.backends.cuda_device import DeviceLauncher, missing

    reason = missing()
    if reason is not None:
        raise PsycheError(f"no kernel can run on {device}: {reason}")
    return CudaBackend(DeviceLauncher(device), host=best())


def named(name: str) -> Backend:
    """The backend of that name. Raises :class:`PsycheError`, which names those that are there."""
    there = {backend.name: backend for backend in available()}
    if name not in there:
        raise PsycheError(f"no backend {name} here: there is {' and '.join(there)}")
    return there[name]
