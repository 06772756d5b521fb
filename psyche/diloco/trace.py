"""The trace of a round: what a node commits to about how it trained, so that others can replay it.

A trace point is the state that an inner step starts from: parameters and inner optimizer. Nothing else is needed: an
inner step draws no random numbers (a run with audits refuses a model with dropout at launch), and the plan determines
the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from typing_extensions import Buffer

from psyche.numerics.digest import blob_root, digest
from psyche.protocol.messages import WITHHELD
from psyche.protocol.wire import Body, Hash, Natural

StoreBlob = Callable[[Buffer], bytes]
"""Takes a blob, which must not change until the next call, and returns its root."""


class TracePoint(Body, frozen=True):
    """The state of a node between two inner steps."""

    DOMAIN = "trace-point"

    step: Natural
    """Inner steps of the round taken so far, overlap steps included."""
    parameters: Hash
    """Root of the flat fp32 parameters."""
    optimizer: Hash
    """Root of the packed inner optimizer state (``training/optimizer_state.py``)."""


def trace_root(points: Sequence[TracePoint]) -> bytes:
    """Hash the trace points into the 32 bytes that a contribution commits to."""
    return digest("trace", *(point.encode() for point in points))


def trace_point_steps(overlap_steps: int, inner_steps: int, every: int | None) -> list[int]:
    """Return the steps of a round's trace points.

    They are the first step after the ``overlap_steps`` that were taken before the previous outer step, the multiples of
    ``every``, and the end after ``inner_steps``.
    """
    between = range(0, inner_steps, every) if every else ()
    end = [inner_steps] if inner_steps > overlap_steps else []
    return [overlap_steps, *(step for step in between if step > overlap_steps), *end]


class Trace:
    """Collects the hash of the data and the trace points of one round."""

    def __init__(self, store_blob: StoreBlob = blob_root) -> None:
        """``store_blob`` hashes the blobs of trace points, and may store them."""
        self._data = blake3(derive_key_context="psyche 1 data")
        self.store_blob = store_blob
        self.points: list[TracePoint] = []

    def record_batch(self, batch: NDArray[np.int64]) -> None:
        """Add the token ids ``[sequences, length]`` of one inner step to the data digest."""
        self._data.update(batch.astype("<i8", copy=False).data.cast("B"))

    def record_point(self, step: int, parameters: Buffer, optimizer: Buffer) -> None:
        """Add the trace point after ``step`` inner steps of the round."""
        self.points.append(TracePoint(step, self.store_blob(parameters), self.store_blob(optimizer)))

    @property
    def data_digest(self) -> bytes:
        return bytes(self._data.digest())

    @property
    def root(self) -> bytes:
        return trace_root(self.points)


class PrivateTrace(Trace):
    """The trace of training on private data: it records nothing, so nothing about the data can leak."""

    def record_batch(self, batch: NDArray[np.int64]) -> None:
        return

    def record_point(self, step: int, parameters: Buffer, optimizer: Buffer) -> None:
        return

    @property
    def data_digest(self) -> bytes:
        return WITHHELD

    @property
    def root(self) -> bytes:
        return WITHHELD
