"""The devices that run kernels: a GPU, or the emulator, which tests the check itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from time import perf_counter
from typing import Protocol

import torch

from psyche.numerics.backends import emulated
from psyche.numerics.backends.cuda_device import DeviceLauncher
from psyche.numerics.backends.launcher import Launcher

WARM_UP, REPEATS = 3, 20


class Machine(Protocol):
    @property
    def launcher(self) -> Launcher: ...

    @property
    def chunks(self) -> tuple[int, ...]:
        """Sizes for the comparison of bits, in chunks of 4096."""

    @property
    def elements(self) -> int:
        """Size for timing."""

    @property
    def timed(self) -> bool:
        """Whether times are meaningful."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Median time of the device for one ``run``."""

    def other_stream(self) -> AbstractContextManager[object]:
        """Within the context, torch's current stream is not the default one."""


class Gpu:
    """A GPU, timed with CUDA events on tensors larger than its caches."""

    chunks = (1, 9, 257)
    timed = True

    def __init__(self, elements: int) -> None:
        self.launcher = DeviceLauncher(torch.device("cuda:0"))
        self.elements = elements

    def seconds(self, run: Callable[[], object]) -> float:
        for _ in range(WARM_UP):
            run()
        timed = [(_event(), _event()) for _ in range(REPEATS)]
        for start, end in timed:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return median(float(start.elapsed_time(end)) for start, end in timed) / 1e3

    def other_stream(self) -> AbstractContextManager[object]:
        stream = torch.cuda.Stream(self.launcher.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.launcher.device))
        return torch.cuda.stream(stream)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class Emulated:
    """The emulator, timed with the wall clock."""

    chunks = (1, 3)
    elements = 8 * 4096
    timed = False

    def __init__(self) -> None:
        self.launcher = emulated.EmulatedLauncher(emulated.build())

    def seconds(self, run: Callable[[], object]) -> float:
        start = perf_counter()
        run()
        return perf_counter() - start

    def other_stream(self) -> AbstractContextManager[object]:
        return nullcontext()
