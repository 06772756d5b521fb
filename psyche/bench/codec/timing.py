"""How long a pass over memory takes, beside a plain copy taken in the same moments."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from psyche.bench.codec.systems import Work

Pass = Literal["encode", "decode_add", "outer"]

REPETITIONS = range(5, 26)
"""At least and at most. Between them, until ``ENOUGH_SECONDS`` have been timed."""
ENOUGH_SECONDS = 0.5


class Clock:
    """Times work on one device: by the wall on the CPU, by events on the GPU. The latter has never been executed."""

    def __init__(self, device: str) -> None:
        self.device = device

    def seconds(self, work: Work) -> float:
        """Of one call. What it returns is kept until the clock has stopped: freeing it is not part of the work."""
        if self.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            kept = work()
            end.record()
            end.synchronize()
            elapsed = float(start.elapsed_time(end)) / 1e3
        else:
            began = time.perf_counter()
            kept = work()
            elapsed = time.perf_counter() - began
        del kept
        return elapsed


class Copy:
    """``target.copy_(source)`` on torch's threads: what a share is a share of.

    On a CPU the copy also fetches the lines that it overwrites, which are not counted. A pass that writes over what it
    has read is spared that and may pass 100 %.
    """

    def __init__(self, count: int, device: str) -> None:
        self._source = torch.ones(count, device=device)
        self._target = torch.zeros(count, device=device)
        self.bytes = 8 * count
        """Read and written."""

    def __call__(self) -> Tensor:
        return self._target.copy_(self._source)


@dataclass(frozen=True)
class Timing:
    """Of one pass over a number of parameters."""

    seconds: float
    """Median."""
    copy_gbps: float
    """Median, bytes read and bytes written counted, of the copies taken between the repetitions."""
    copies: float
    """Seconds of a copy over seconds of the pass: the median over pairs of neighbours in time, so that whatever else
    runs on the machine slows both."""


def time_beside_copy(clock: Clock, work: Work, copy: Copy) -> Timing:
    """Warm up once, then repeat copy and work in turns."""
    clock.seconds(copy)
    clock.seconds(work)
    pairs: list[tuple[float, float]] = []
    while len(pairs) < REPETITIONS.start or (
        len(pairs) < REPETITIONS.stop - 1 and sum(took for _, took in pairs) < ENOUGH_SECONDS
    ):
        pairs.append((clock.seconds(copy), clock.seconds(work)))
    return Timing(
        seconds=median(took for _, took in pairs),
        copy_gbps=copy.bytes / median(copied for copied, _ in pairs) / 1e9,
        copies=median(copied / took for copied, took in pairs),
    )


def bytes_per_parameter(which: Pass, bits: float, *, error_feedback: bool, sparse: bool) -> float | None:
    """What a fused pass has to move, fp32 state and ``bits`` of payload a parameter.

    - encode: read base and local, write the payload; with error feedback also read and write e.
    - decode_add: read the payload, read and write the sum. None for a sparse payload: only what it kept is touched.
    - outer: read gradient, θ and m; write θ, m and the local copy.
    """
    if which == "outer":
        return 24.0
    if which == "encode":
        return (16 if error_feedback else 8) + bits / 8
    return None if sparse else 8 + bits / 8
