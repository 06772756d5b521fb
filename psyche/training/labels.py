"""What of a sequence is learned: all of it, or, where sequences are padded, what comes before the padding."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

IGNORED: Final = -100
"""The label that PyTorch's cross entropy, and so every model of ``transformers``, leaves out of the loss."""


def labels(batch: NDArray[np.int64], end: int | None) -> NDArray[np.int64]:
    """Labels ``[sequences, length]``: the tokens, but for those after a sequence's first ``end``; all where it is None.

    That one is predicted: where a document ends is learned. Labels are not shifted; the model does that.
    """
    if end is None:
        return batch
    padding = np.logical_or.accumulate(batch[:, :-1] == end, axis=1)
    result = batch.copy()
    result[:, 1:][padding] = IGNORED
    return result


def predicted(targets: NDArray[np.int64]) -> int:
    """How many tokens the loss of these labels is the mean over."""
    return int((targets[:, 1:] != IGNORED).sum())
