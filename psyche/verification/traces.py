"""What a node commits to about how it trained, so that anyone with the base state can re-run it (P4)."""

from __future__ import annotations

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor

from psyche.numerics.digest import digest


class Trace:
    """Collects, over one round, a hash of the data seen and hashes of the parameters at trace points.

    There is one trace point today, after the last inner step; a trace with more of them has the same form.
    """

    def __init__(self) -> None:
        self._data = blake3(derive_key_context="psyche 1 data")
        self._points: list[bytes] = []

    def saw(self, batch: NDArray[np.int64]) -> None:
        """Record the token ids ``[sequences, length]`` of one inner step."""
        self._data.update(batch.astype("<i8", copy=False).data.cast("B"))

    def mark(self, step: int, parameters: Tensor) -> None:
        """Record a trace point: the flat fp32 parameters after ``step`` inner steps of this round."""
        values = parameters.cpu().numpy().data.cast("B")
        self._points.append(
            digest("trace-point", step.to_bytes(8, "little"), blake3(values, max_threads=blake3.AUTO).digest())
        )

    @property
    def data_digest(self) -> bytes:
        return bytes(self._data.digest())

    @property
    def root(self) -> bytes:
        return digest("trace", *self._points)
