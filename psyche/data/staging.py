"""The staging directory of a preparation: sequences in document order, and a journal to resume from.

Each split is one file that only grows, by whole sequences, so that a crash is undone by one truncation.
``journal.json`` is replaced after the files that it describes are on disk: they are as long as it says, or longer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec
import numpy as np

from psyche.data.encoding import Document, Tokens, document_hash, pack, pad
from psyche.data.index import TokenizerFile
from psyche.durable import write_durably
from psyche.numerics.digest import blob_root, digest

WRITE_BYTES = 1 << 20
JOURNAL = "journal.json"


class SplitState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The state from which to resume a split after a crash, if its file is :func:`intact`."""

    sequences: int = 0
    """Sequences in the file, which may be longer."""
    bytes: int = 0
    """Bytes of these sequences."""
    carry: tuple[int, ...] = ()
    """Tokens of the last, incomplete sequence; fewer than ``sequence_length``."""


def intact(path: Path, state: SplitState) -> bool:
    """Return whether the file is at least as long as ``state`` says."""
    return (path.stat().st_size if path.is_file() else 0) >= state.bytes


class SplitWriter:
    """Appends documents to the file ``path`` as sequences of ``sequence_length`` tokens.

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
        """Append one document: its tokens, of which the last is the end-of-document token."""
        tokens = document.astype(self._carry.dtype)
        if self._packing == "pad":
            rows = pad(tokens, self._width)
        else:
            rows, self._carry = pack(np.concatenate([self._carry, tokens]), self._width)
        self._file.write(rows.data)
        self._sequences += len(rows)
        self.bytes += rows.nbytes

    def sync(self) -> SplitState:
        """Flush to disk and return the state to resume from."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return SplitState(self._sequences, self.bytes, tuple(self._carry.tolist()))

    def close(self) -> None:
        """Close the file without flushing it to disk."""
        self._file.close()


class PartState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far one part of a mixture has been read. A source that is no mixture has one part."""

    tokens: int = 0
    """Tokens of all its documents so far."""
    passes: int = 0
    """How often the part was read to its end."""
    documents: int = 0
    """Documents read in the current pass."""
    seen: str = ""
    """Hash chain over these documents, which detects a source that changed between two runs."""

    def after(self, document: Document, passes: int) -> PartState:
        """Return the state after one more document, read after ``passes`` complete passes."""
        documents, seen = (self.documents, self.seen) if passes == self.passes else (0, "")
        return PartState(self.tokens + len(document.tokens), passes, documents + 1, _chain(seen, document.key))

    def skip(self, stream: Iterator[str]) -> bool:
        """Advance ``stream`` past the documents already read; return False if they have changed since."""
        count, seen = 0, ""
        for text in islice(stream, self.documents):
            count, seen = count + 1, _chain(seen, document_hash(text))
        return (count, seen) == (self.documents, self.seen)


class PreparationJournal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Progress of a preparation."""

    tokenizer: tuple[TokenizerFile, ...]
    total: int | None
    """Documents in the corpus, if training the tokenizer has counted them."""
    parts: tuple[PartState, ...]
    documents: int = 0
    """Documents whose tokens are in the split files."""
    train: SplitState = SplitState()
    heldout: SplitState = SplitState()
    encoded: bool = False
    """Whether all documents are encoded: the source is not needed any more."""

    def save(self, staging: Path) -> None:
        write_durably(staging / JOURNAL, msgspec.json.encode(self))

    def after(self, number: int, document: Document, passes: int) -> PreparationJournal:
        """Return the journal after one more document of part ``number``; the caller updates the splits' states."""
        part = self.parts[number].after(document, passes)
        parts = (*self.parts[:number], part, *self.parts[number + 1 :])
        return msgspec.structs.replace(self, parts=parts, documents=self.documents + 1)

    def skip(self, streams: Sequence[Iterator[str]]) -> bool:
        """:meth:`PartState.skip` for every part."""
        return all(part.skip(stream) for part, stream in zip(self.parts, streams, strict=True))


def load_journal(staging: Path, tokenizer: Path) -> PreparationJournal | None:
    """Load the journal in ``staging``; None if there is none or a file does not match it."""
    try:
        journal = msgspec.json.decode((staging / JOURNAL).read_bytes(), type=PreparationJournal)
        sound = (
            all(blob_root((tokenizer / item.file).read_bytes()).hex() == item.root for item in journal.tokenizer)
            and intact(staging / "train", journal.train)
            and intact(staging / "heldout", journal.heldout)
        )
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return journal if sound else None


def _chain(seen: str, document: bytes) -> str:
    """Extend the hash chain by one document; hex."""
    return digest("documents", bytes.fromhex(seen), document).hex()
