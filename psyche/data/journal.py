"""How far an interrupted preparation got, and whether what it left can be believed.

``journal.json`` is replaced after the files it speaks of are on the disk, so they are as it says, or longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import msgspec

from psyche.data.encoding import Document, document_hash
from psyche.data.index import TokenizerFile
from psyche.data.staging import SplitState, intact
from psyche.durable import write_durably
from psyche.numerics.digest import blob_root, digest

JOURNAL = "journal.json"


class PartState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a source has been read; a source that is no mixture is a mixture of one part."""

    tokens: int = 0
    """Of all its documents so far."""
    passes: int = 0
    """How often it was read to its end."""
    documents: int = 0
    """Since it was last begun."""
    seen: str = ""
    """Hash chain over these documents: a source that changed meanwhile is noticed, not mixed in."""

    def after(self, document: Document, passes: int) -> PartState:
        """The state after one more document, taken when the part had been read to its end ``passes`` times."""
        documents, seen = (self.documents, self.seen) if passes == self.passes else (0, "")
        return PartState(self.tokens + len(document.tokens), passes, documents + 1, _chain(seen, document.key))

    def skip(self, stream: Iterator[str]) -> bool:
        """Advance ``stream`` past the documents that are done; False if they are not those that were read then."""
        count, seen = 0, ""
        for text in islice(stream, self.documents):
            count, seen = count + 1, _chain(seen, document_hash(text))
        return (count, seen) == (self.documents, self.seen)


class Journal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Plain facts; the files beside it hold the rest."""

    tokenizer: tuple[TokenizerFile, ...]
    total: int | None
    """Documents in the corpus, where the tokenizer's training has counted them."""
    parts: tuple[PartState, ...]
    documents: int = 0
    """Documents whose tokens are in the splits."""
    train: SplitState = SplitState()
    heldout: SplitState = SplitState()
    encoded: bool = False
    """Whether these were all: the source is not needed any more."""

    def save(self, staging: Path) -> None:
        write_durably(staging / JOURNAL, msgspec.json.encode(self))

    def after(self, number: int, document: Document, passes: int) -> Journal:
        """The journal with one more document of part ``number``; the splits' states are the caller's to renew."""
        part = self.parts[number].after(document, passes)
        parts = (*self.parts[:number], part, *self.parts[number + 1 :])
        return msgspec.structs.replace(self, parts=parts, documents=self.documents + 1)

    def skip(self, streams: Sequence[Iterator[str]]) -> bool:
        """:meth:`PartState.skip` for every part."""
        return all(part.skip(stream) for part, stream in zip(self.parts, streams, strict=True))


def load_journal(staging: Path, tokenizer: Path) -> Journal | None:
    """The journal in ``staging``, if there is one and every file is what it says."""
    try:
        journal = msgspec.json.decode((staging / JOURNAL).read_bytes(), type=Journal)
        sound = (
            all(blob_root((tokenizer / item.file).read_bytes()).hex() == item.root for item in journal.tokenizer)
            and intact(staging / "train", journal.train)
            and intact(staging / "heldout", journal.heldout)
        )
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return journal if sound else None


def _chain(seen: str, document: bytes) -> str:
    """Hash of the documents so far and one more, hex."""
    return digest("documents", bytes.fromhex(seen), document).hex()
