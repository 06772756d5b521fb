"""The interface of a kernel launcher, which a GPU and the emulator implement."""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch
from torch import Tensor

THREADS = 256
"""Threads per block in every kernel (kernels/cuda/lanes.cuh)."""

Argument = Tensor | int | float | None
"""A kernel argument: a pointer to a tensor's data (``None``: null), a 64-bit integer, or an fp32 value."""


class Launcher(Protocol):
    """Runs kernels in the order of the calls, on tensors of its device."""

    @property
    def device(self) -> torch.device: ...

    @property
    def detail(self) -> str:
        """The hardware that the kernels run on, for log lines."""

    def launch(self, kernel: str, blocks: int, *arguments: Argument) -> None:
        """Start ``blocks`` ≥ 1 blocks of ``THREADS`` threads; need not wait for them.

        The tensors must stay alive until the kernel has run, as those of torch's allocator do on one stream.
        """


def as_ctype(argument: Argument) -> ctypes.c_void_p | ctypes.c_uint64 | ctypes.c_float:
    """Convert a kernel argument to a ctypes value."""
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, int):
        return ctypes.c_uint64(argument)
    return ctypes.c_float(argument)
