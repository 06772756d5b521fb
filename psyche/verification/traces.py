"""What a node commits to about how it trained, so that anyone with the base state can re-run it (P4)."""

from __future__ import annotations

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor

from psyche.numerics.digest import digest
from psyche.protocol.messages import WITHHELD


class Trace:
    """Collects, over one round, a hash of the data seen and hashes of the parameters at trace points.

    The last trace point is after the last inner step. A round that was not trained from θ, because inner steps went on
    during the exchange before it, has one before the first step, too; a trace with more of them has the same form.
    """

    def __init__(self, start: bytes | None = None) -> None:
        """``start`` is what :meth:`mark` returned for the parameters that the first inner step changes."""
        self._data = blake3(derive_key_context="psyche 1 data")
        self._points = [] if start is None else [_point(0, start)]

    def saw(self, batch: NDArray[np.int64]) -> None:
        """Record the token ids ``[sequences, length]`` of one inner step."""
        self._data.update(batch.astype("<i8", copy=False).data.cast("B"))

    def mark(self, step: int, parameters: Tensor) -> bytes:
        """Record a trace point: the flat fp32 parameters after ``step`` inner steps of this round.

        Returns their hash, 32 bytes.
        """
        found = bytes(blake3(parameters.cpu().numpy().data.cast("B"), max_threads=blake3.AUTO).digest())
        self._points.append(_point(step, found))
        return found

    @property
    def data_digest(self) -> bytes:
        return bytes(self._data.digest())

    @property
    def root(self) -> bytes:
        return digest("trace", *self._points)


class Withheld(Trace):
    """The trace of private data: nothing of them is kept, so that nothing can be shown."""

    def saw(self, batch: NDArray[np.int64]) -> None:
        return

    def mark(self, step: int, parameters: Tensor) -> bytes:
        return WITHHELD

    @property
    def data_digest(self) -> bytes:
        return WITHHELD

    @property
    def root(self) -> bytes:
        return WITHHELD


def _point(step: int, parameters: bytes) -> bytes:
    return digest("trace-point", step.to_bytes(8, "little"), parameters)
