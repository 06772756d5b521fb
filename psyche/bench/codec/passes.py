"""Time one pass of a codec or an outer step on one device, in turns with a plain copy, and measure its error."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Literal

import torch
from torch import Tensor

from psyche.bench.codec.coders import Coder, Stepper, Work, parts
from psyche.bench.codec.samples import PayloadLoss, Vectors, loss_of
from psyche.bench.harness.rows import Column, Row, percent
from psyche.telemetry.formatting import amount

Pass = Literal["encode", "decode_add", "outer"]

REPETITIONS = range(5, 26)
"""Least and most repetitions. Between them, ``ENOUGH_SECONDS`` are timed."""
PROBE, GROWTH = 1 << 16, 4
"""Parameters of a codec's first trial, and the factor to the next one."""
SLOW_SECONDS = 1.0
"""A codec whose repetitions would take longer is timed on fewer parameters."""
WEIGHT = 0.25
"""Weight of a payload in decode_add, an fp32 value."""
ENOUGH_SECONDS = 0.5


class Clock:
    """Times work on one device: by the wall clock on the CPU, by events on the GPU (which has not been run yet)."""

    def __init__(self, device: str) -> None:
        self.device = device

    def seconds(self, work: Work) -> float:
        """Time one call. Its result is freed after the clock has stopped."""
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
    """``target.copy_(source)`` on torch's threads, to which passes are compared.

    On a CPU the copy also reads the cache lines that it overwrites, which are not counted. A pass in place does not,
    and may exceed 100 %.
    """

    def __init__(self, count: int, device: str) -> None:
        self._source = torch.ones(count, device=device)
        self._target = torch.zeros(count, device=device)
        self.bytes = 8 * count
        """Bytes read and written."""

    def __call__(self) -> Tensor:
        return self._target.copy_(self._source)


@dataclass(frozen=True)
class PassTiming:
    """Time of one pass over a number of parameters."""

    seconds: float
    """Median."""
    copy_gbps: float
    """Median of the copies between the repetitions; bytes read and written count."""
    copies: float
    """Seconds of a copy over seconds of the pass: median over pairs of neighbours, which other load slows alike."""


def time_beside_copy(clock: Clock, work: Work, copy: Copy) -> PassTiming:
    """Warm up once, then repeat copy and work in turns."""
    clock.seconds(copy)
    clock.seconds(work)
    pairs: list[tuple[float, float]] = []
    while len(pairs) < REPETITIONS.start or (
        len(pairs) < REPETITIONS.stop - 1 and sum(took for _, took in pairs) < ENOUGH_SECONDS
    ):
        pairs.append((clock.seconds(copy), clock.seconds(work)))
    return PassTiming(
        seconds=median(took for _, took in pairs),
        copy_gbps=copy.bytes / median(copied for copied, _ in pairs) / 1e9,
        copies=median(copied / took for copied, took in pairs),
    )


def bytes_per_parameter(which: Pass, bits: float, *, error_feedback: bool, sparse: bool) -> float | None:
    """Return bytes that a fused pass must move per parameter, with fp32 state and a payload of ``bits``.

    - encode: read base and local, write the payload; with error feedback also read and write e.
    - decode_add: read the payload, read and write the sum. ``None`` for a sparse payload, which touches few values.
    - outer: read gradient, θ and m; write θ, m and the local copy.
    """
    if which == "outer":
        return 24.0
    if which == "encode":
        return (16 if error_feedback else 8) + bits / 8
    return None if sparse else 8 + bits / 8


def gbps_text(gbps: float) -> str:
    return f"{gbps:.3f}" if gbps < 1 else f"{gbps:.2f}"


class CodecRow(Row, frozen=True, rename={"pass_": "pass"}):
    """One pass of one codec, or one outer step. ``None``: not applicable. Columns are those of the outer steps."""

    system: Annotated[str, Column("system", left=True)]
    codec: Annotated[str | None, Column("as", left=True)]
    """Name in its system. ``None``: psyche's outer step."""
    backend: Annotated[str, Column("backend", left=True)]
    """``torch``, ``native`` or ``cuda``; ``cpu`` for rivals."""
    pass_: Pass
    gbps: Annotated[float, Column("GB/s", gbps_text)]
    """1e9 bytes of fp32 parameters (4 each) per second, in the median repetition."""
    share_of_copy: Annotated[float | None, Column("% of copy", percent)]
    """Bytes that a fused pass must move (:func:`bytes_per_parameter`) over the bytes that a copy moves in the same
    time; median over pairs of neighbouring repetitions."""
    bits_per_param: float | None
    """Bits of a payload of Gaussian values, headers and scales included. Entropy coding saves more on real ones."""
    rel_l2_gaussian: float | None
    """‖x − D(Q(x))‖ / ‖x‖ without error feedback, of Gaussian values."""
    rel_l2_real: float | None
    """‖x − D(Q(x))‖ / ‖x‖ without error feedback, of the real pseudo-gradient."""
    parameters: Annotated[int, Column("parameters", amount)]
    """Parameters that were timed."""
    threads: int
    copy_gbps: float
    """Bytes read and written by the copies between this row's repetitions, 1e9 per second."""
    seconds: float
    """Duration of the median repetition."""


class PassBench:
    """The vectors and the clock of one device."""

    def __init__(self, size: int, device: str, gaussian: Tensor, real: Tensor) -> None:
        """Time on ``size`` parameters; measure errors on ``gaussian`` and ``real`` (fp32 ``[n]``)."""
        self._clock = Clock(device)
        self._copy = Copy(size, device)
        self._vectors = Vectors.random(size, device)
        self._size = size
        self._samples = gaussian, real

    def coder(self, coder: Coder) -> list[CodecRow]:
        """Measure both passes."""
        gaussian, real = (loss_of(coder, values) for values in self._samples)
        count = self._affordable(coder)
        rows = []
        for which, work in self._passes(coder, count).items():
            moved = bytes_per_parameter(which, gaussian.bits, error_feedback=coder.error_feedback, sparse=coder.sparse)
            rows.append(self._row(coder, which, work, count, moved, gaussian, real))
        return rows

    def stepper(self, stepper: Stepper) -> CodecRow:
        """Measure an outer step."""
        theta, gradient = self._vectors.base.clone(), self._vectors.base - self._vectors.local
        work = stepper.bind(theta, torch.zeros_like(theta), gradient, torch.empty_like(theta))
        moved = bytes_per_parameter("outer", 0.0, error_feedback=False, sparse=False)
        return self._row(stepper, "outer", work, self._size, moved)

    def _passes(self, coder: Coder, count: int) -> dict[Pass, Work]:
        """Both passes over the first ``count`` parameters, from a zero residual."""
        at, ranges = self._vectors, parts(count)
        at.residual.zero_()
        at.out.zero_()

        def encode() -> list[object]:
            return [
                coder.encode(at.base[part], at.local[part], at.residual[part] if coder.error_feedback else None)
                for part in ranges
            ]

        payloads = encode()

        def decode_add() -> None:
            for part, payload in zip(ranges, payloads, strict=True):
                coder.decode_add(payload, WEIGHT, at.out[part])

        return {"encode": encode, "decode_add": decode_add}

    def _affordable(self, coder: Coder) -> int:
        """Find the most parameters, ``PROBE`` × 4ⁿ, for which no pass takes longer than ``SLOW_SECONDS``."""
        count = min(PROBE, self._size)
        self._trial(coder, count)  # the first call also loads and compiles what it needs
        while count < self._size and GROWTH * self._trial(coder, count) <= SLOW_SECONDS:
            count = min(GROWTH * count, self._size)
        return count

    def _trial(self, coder: Coder, count: int) -> float:
        """Return seconds of the slower pass over ``count`` parameters."""
        return max(self._clock.seconds(work) for work in self._passes(coder, count).values())

    def _row(
        self,
        measured: Coder | Stepper,
        which: Pass,
        work: Work,
        count: int,
        moved: float | None,
        gaussian: PayloadLoss | None = None,
        real: PayloadLoss | None = None,
    ) -> CodecRow:
        timing = time_beside_copy(self._clock, work, self._copy)
        return CodecRow.of(
            measured,
            timing,
            pass_=which,
            gbps=4 * count / timing.seconds / 1e9,
            share_of_copy=None if moved is None else moved * count / self._copy.bytes * timing.copies,
            bits_per_param=gaussian.bits if gaussian else None,
            rel_l2_gaussian=gaussian.rel_l2 if gaussian else None,
            rel_l2_real=real.rel_l2 if real else None,
            parameters=count,
            threads=torch.get_num_threads(),
        )
