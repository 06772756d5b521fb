"""What the check runs on: a GPU, or the emulator so that the check itself is checked where there is none."""

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
        """Sizes at which bits are compared, in chunks of 4096."""

    @property
    def elements(self) -> int:
        """Size at which kernels are timed."""

    @property
    def timed(self) -> bool:
        """Whether times say something about the kernels."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Median time that the device spends on one ``run``."""

    def other_stream(self) -> AbstractContextManager[object]:
        """Within it, torch's current stream is not the default one."""


class Gpu:
    """Times with CUDA events, on tensors too large for its caches."""

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
    """Times with the wall clock, which says nothing about a GPU."""

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
