"""Documents to sequences of one length."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.unsignedinteger]


def pack(stream: Tokens, width: int) -> tuple[Tokens, Tokens]:
    """Cut ``stream``, documents one after the other, into rows ``[n, width]``, and what is left at its end."""
    whole = len(stream) // width * width
    return stream[:whole].reshape(-1, width), stream[whole:]


def pad(document: Tokens, width: int) -> Tokens:
    """One document, which ends with its end token, as rows ``[n, width]``; the last is filled up with the end token.

    A row that would hold nothing but the end token teaches nothing, and is left out: every row predicts something.
    """
    end = document[-1]
    count = -(-(len(document) - 1) // width)
    rows = np.full(count * width, end, dtype=document.dtype)
    kept = min(len(document), len(rows))
    rows[:kept] = document[:kept]
    return rows.reshape(count, width)
