"""The time that the whole check may take, and which share of it each part may use."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from psyche.bench.gpu.requirements import KERNELS, TIMES, TRAINING

ENDS: Mapping[str, float] = {KERNELS: 0.5, TIMES: 0.65, TRAINING: 1.0}
"""Share of the time that may be used when a part ends. What a part leaves over, the next ones have."""


class Budget:
    """Counts from the moment it is made."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self.clock = clock
        self._start = clock()

    @property
    def used(self) -> float:
        return self.clock() - self._start

    def left(self, part: str) -> float:
        """Seconds until ``part`` has to end; negative where it is over."""
        return ENDS[part] * self.seconds - self.used
