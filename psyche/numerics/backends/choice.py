"""Which backends work on this machine, fastest first."""

from __future__ import annotations

from psyche.numerics.backends.base import Backend, TorchBackend


def best() -> Backend:
    """The fastest backend for tensors on the CPU."""
    return TorchBackend()


def available() -> list[Backend]:
    """All backends that work here, fastest first; PyTorch is always the last."""
    return [TorchBackend()]
