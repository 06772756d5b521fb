"""Sequences in the order of their documents, before they are shuffled: one file a split, which only ever grows.

It grows by whole sequences, so a crash is undone by one truncation.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec
import numpy as np

from psyche.data.packing import Tokens, pack, pad

WRITE_BYTES = 1 << 20


class SplitState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that is needed to go on with a split after a crash, if its file is :func:`intact`."""

    sequences: int = 0
    """In the file, which may be longer."""
    bytes: int = 0
    """That these take."""
    carry: tuple[int, ...] = ()
    """Tokens of the sequence that is not yet full; fewer than ``sequence_length``."""


def intact(path: Path, state: SplitState) -> bool:
    """Whether the file holds at least what ``state`` says it does."""
    return (path.stat().st_size if path.is_file() else 0) >= state.bytes


class SplitWriter:
    """Documents' tokens to sequences of ``sequence_length`` at the end of the file ``path``.

    ``dtype`` is little-endian unsigned; ``packing`` is that of :class:`~psyche.config.Data`.
    """

    def __init__(
        self, path: Path, dtype: str, sequence_length: int, packing: Literal["pack", "pad"], state: SplitState
    ) -> None:
        self._width = sequence_length
        self._packing = packing
        self._carry: Tokens = np.array(state.carry, dtype=dtype)
        self._sequences = state.sequences
        self.bytes = state.bytes
        self._file: BinaryIO = path.open("r+b" if state.bytes else "wb", buffering=WRITE_BYTES)
        self._file.truncate(state.bytes)
        self._file.seek(state.bytes)

    def add(self, document: Tokens) -> None:
        """Append one document: its tokens and, last, the token that ends it."""
        tokens = document.astype(self._carry.dtype)
        if self._packing == "pad":
            rows = pad(tokens, self._width)
        else:
            rows, self._carry = pack(np.concatenate([self._carry, tokens]), self._width)
        self._file.write(rows.data)
        self._sequences += len(rows)
        self.bytes += rows.nbytes

    def sync(self) -> SplitState:
        """Put everything so far on the disk, and say how to go on from here."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return SplitState(self._sequences, self.bytes, tuple(self._carry.tolist()))

    def close(self) -> None:
        """Let go of the file, whatever state it is in."""
        self._file.close()
