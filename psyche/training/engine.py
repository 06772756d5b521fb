"""The interface of training engines, and which tokens of a batch they predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from psyche.numerics.flat import FlatLayout

Batch = NDArray[np.int64]
"""Token ids ``[sequences, length]``."""


class Engine(Protocol):
    """Trains a model whose parameters the rest of the system sees as one flat fp32 vector."""

    layout: FlatLayout
    steps: int
    """Inner steps taken by the optimizer; 0 where it has no state."""

    def step(self, batch: Batch, lr: float) -> float:
        """Take one inner step: forward, backward, clip, optimizer. Returns the mean loss in nats per token."""
        ...

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """Compute the sum of the loss over the predicted tokens, and their number. Changes nothing."""
        ...

    def read(self, flat: Tensor) -> None:
        """Copy the parameters to ``flat`` (``[layout.size]`` fp32 on the CPU)."""
        ...

    def write(self, flat: Tensor, parts: Sequence[slice] | None = None) -> None:
        """Set the parameters, or those in the ranges ``parts``, from ``flat``.

        Keeps the state of the inner optimizer (DiLoCo, arXiv 2311.08105, §3).
        """
        ...

    def shift(self, flat: Tensor, parts: Sequence[slice]) -> None:
        """Add ``flat`` to the parameters in the ranges ``parts``."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of the inner optimizer by name, for a checkpoint."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load what :meth:`state` returned. Raises ``ValueError`` where names or shapes differ."""
        ...


IGNORED: Final = -100
"""The label that PyTorch's cross entropy, and so every model of ``transformers``, leaves out of the loss."""


def target_labels(batch: Batch, end: int | None) -> Batch:
    """Labels ``[sequences, length]``: the tokens, with ``IGNORED`` after a sequence's first ``end`` token.

    The ``end`` token itself is predicted, so the model learns where a document ends. With ``end`` None (no padding) the
    labels are the tokens. Labels are not shifted; the model does that.
    """
    if end is None:
        return batch
    padding = np.logical_or.accumulate(batch[:, :-1] == end, axis=1)
    result = batch.copy()
    result[:, 1:][padding] = IGNORED
    return result


def predicted_tokens(targets: Batch) -> int:
    """Return the number of tokens that the mean loss of these labels covers."""
    return int((targets[:, 1:] != IGNORED).sum())
