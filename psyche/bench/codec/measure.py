"""One codec or outer step on one device: what it loses, how long it takes, and the rows that say so."""

from __future__ import annotations

import torch
from torch import Tensor

from psyche.bench.codec.data import Loss, Vectors, loss_of
from psyche.bench.codec.systems import Coder, Stepper, Work, parts
from psyche.bench.codec.table import Row
from psyche.bench.codec.timing import Clock, Copy, Pass, bytes_per_parameter, time_beside_copy

PROBE, GROWTH = 1 << 16, 4
"""Parameters of the first trial of a codec, and how many times as many the next one has."""
SLOW_SECONDS = 1.0
"""A codec whose repetitions would take longer is timed on fewer parameters."""
WEIGHT = 0.25
"""Of a payload in decode_add; an fp32 value."""


class Bench:
    """The vectors and the clock of one device."""

    def __init__(self, size: int, device: str, gaussian: Tensor, real: Tensor) -> None:
        """``size`` parameters are timed; what is lost is measured on ``gaussian`` and ``real`` (fp32 ``[n]``)."""
        self._clock = Clock(device)
        self._copy = Copy(size, device)
        self._vectors = Vectors.random(size, device)
        self._size = size
        self._samples = gaussian, real

    def coder(self, coder: Coder) -> list[Row]:
        """The rows of both passes."""
        gaussian, real = (loss_of(coder, values) for values in self._samples)
        count = self._affordable(coder)
        works = self._passes(coder, count)
        rows = []
        for which, work in works.items():
            moved = bytes_per_parameter(which, gaussian.bits, error_feedback=coder.error_feedback, sparse=coder.sparse)
            rows.append(self._row(coder, which, work, count, moved, gaussian, real))
        return rows

    def _passes(self, coder: Coder, count: int) -> dict[Pass, Work]:
        """Both passes over the first ``count`` parameters, from a fresh residual."""
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

    def stepper(self, stepper: Stepper) -> Row:
        theta, gradient = self._vectors.base.clone(), self._vectors.base - self._vectors.local
        work = stepper.bind(theta, torch.zeros_like(theta), gradient, torch.empty_like(theta))
        moved = bytes_per_parameter("outer", 0.0, error_feedback=False, sparse=False)
        return self._row(stepper, "outer", work, self._size, moved)

    def _affordable(self, coder: Coder) -> int:
        """As many parameters as take neither pass longer than ``SLOW_SECONDS``, by trial: ``PROBE`` × 4ⁿ at most."""
        count = min(PROBE, self._size)
        self._trial(coder, count)  # the first call also loads and compiles what it needs
        while count < self._size and GROWTH * self._trial(coder, count) <= SLOW_SECONDS:
            count = min(GROWTH * count, self._size)
        return count

    def _trial(self, coder: Coder, count: int) -> float:
        """Seconds of the slower pass over ``count`` parameters."""
        works = self._passes(coder, count)
        return max(self._clock.seconds(work) for work in works.values())

    def _row(
        self,
        measured: Coder | Stepper,
        which: Pass,
        work: Work,
        count: int,
        moved: float | None,
        gaussian: Loss | None = None,
        real: Loss | None = None,
    ) -> Row:
        timing = time_beside_copy(self._clock, work, self._copy)
        return Row(
            system=measured.system,
            codec=measured.codec,
            backend=measured.backend,
            pass_=which,
            gbps=4 * count / timing.seconds / 1e9,
            share_of_copy=None if moved is None else moved * count / self._copy.bytes * timing.copies,
            bits_per_param=gaussian.bits if gaussian else None,
            rel_l2_gaussian=gaussian.rel_l2 if gaussian else None,
            rel_l2_real=real.rel_l2 if real else None,
            parameters=count,
            threads=torch.get_num_threads(),
            copy_gbps=timing.copy_gbps,
            seconds=timing.seconds,
        )
