"""What a node commits to about how it trained, so that anyone with the base state can re-run it (P4).

A trace point is what an inner step starts from: parameters and inner optimizer. There is no third thing: an inner step
draws no random number (``diloco/launch.py`` refuses to audit a model with dropout), and which data it sees is the
protocol's to say.
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

Keep = Callable[[Buffer], bytes]
"""Takes a blob, which has to stay as it is until the next one is given, and returns its root."""


class Point(Body, frozen=True):
    """Where a node stood between two inner steps."""

    DOMAIN = "trace-point"

    step: Natural
    """Inner steps of the round behind it, late ones included."""
    parameters: Hash
    """Root of the flat fp32 parameters."""
    optimizer: Hash
    """Root of the inner optimizer's state (``training/optimizer_state.py``)."""


def trace_root(points: Sequence[Point]) -> bytes:
    """What a contribution says of its trace, 32 bytes."""
    return digest("trace", *(point.encode() for point in points))


def point_steps(late: int, done: int, every: int | None) -> list[int]:
    """Steps of the points of a round of ``done`` inner steps, of which the first ``late`` were taken before the outer
    step of the round before: the first step that was not, multiples of ``every``, the end."""
    between = range(0, done, every) if every else ()
    return [late, *(step for step in between if step > late), *([done] if done > late else [])]


class Trace:
    """Collects, over one round, a hash of the data seen, and the trace points."""

    def __init__(self, keep: Keep = blob_root) -> None:
        """``keep`` hashes the points' blobs, and may store them."""
        self._data = blake3(derive_key_context="psyche 1 data")
        self.keep = keep
        self.points: list[Point] = []

    def saw(self, batch: NDArray[np.int64]) -> None:
        """Record the token ids ``[sequences, length]`` of one inner step."""
        self._data.update(batch.astype("<i8", copy=False).data.cast("B"))

    def mark(self, step: int, parameters: Buffer, optimizer: Buffer) -> None:
        """Record the point after ``step`` inner steps of this round."""
        self.points.append(Point(step, self.keep(parameters), self.keep(optimizer)))

    @property
    def data_digest(self) -> bytes:
        return bytes(self._data.digest())

    @property
    def root(self) -> bytes:
        return trace_root(self.points)


class Withheld(Trace):
    """The trace of private data: nothing of them is kept, so that nothing can be shown."""

    def saw(self, batch: NDArray[np.int64]) -> None:
        return

    def mark(self, step: int, parameters: Buffer, optimizer: Buffer) -> None:
        return

    @property
    def data_digest(self) -> bytes:
        return WITHHELD

    @property
    def root(self) -> bytes:
        return WITHHELD
