"""Kernel launches on a GPU, through ``cuda.core`` and torch's current stream."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from psyche.numerics.backends.cuda_compile import cubin
from psyche.numerics.backends.launcher import THREADS, Argument, as_ctype


def unavailable_reason() -> str | None:
    """Return why kernels cannot run on a GPU here and how to fix it; ``None`` where they can.

    Loads neither cuda.core nor a kernel.
    """
    if torch.version.cuda is None:
        return "torch is a CPU build: install the CUDA build (pip install --force-reinstall 'torch==2.13.0')"
    if not torch.cuda.is_available():
        return "torch sees no GPU: install or start NVIDIA's driver (nvidia-smi must list a GPU)"
    if find_spec("cuda") is None or not all(find_spec(f"cuda.{part}") for part in ("core", "bindings")):
        return "cuda.core or cuda.bindings is not installed: pip install 'psyche[cuda]'"
    return None


class DeviceLauncher:
    """Launches on torch's current stream of one GPU; neither copies nor synchronises."""

    def __init__(self, device: torch.device) -> None:
        """Load or compile the kernels for ``device``. Raises what :func:`cuda_compile.cubin` raises."""
        from cuda.core import Device, ObjectCode

        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._core = Device(self.device.index)
        with torch.cuda.device(self.device):
            torch.cuda.current_stream()  # creates torch's primary context of the device
            self._core.set_current()
            self._code = ObjectCode.from_cubin(cubin(self._core.arch), name="psyche")
        self._kernels: dict[str, Any] = {}
        self.detail = f"{torch.cuda.get_device_name(self.device)}, sm_{self._core.arch}"

    def launch(self, kernel: str, blocks: int, *arguments: Argument) -> None:
        from cuda.core import LaunchConfig, launch

        # contexts are per thread: make this one current, and restore the previous device afterwards
        with torch.cuda.device(self.device):
            self._core.set_current()
            if kernel not in self._kernels:
                self._kernels[kernel] = self._code.get_kernel(kernel)
            config = LaunchConfig(grid=blocks, block=THREADS)
            stream = _Stream(torch.cuda.current_stream(self.device).cuda_stream)
            launch(stream, config, self._kernels[kernel], *(_argument(argument) for argument in arguments))


@dataclass(frozen=True)
class _Stream:
    """A torch stream for cuda.core. torch's own class does not implement the protocol up to 2.8."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


def _argument(argument: Argument) -> Any:
    """Convert an argument for cuda.core, which takes pointers as integers and scalars as ctypes values."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return 0 if argument is None else as_ctype(argument)
