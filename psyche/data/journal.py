"""How far an interrupted preparation got, and whether what it left can be believed.

``journal.json`` is replaced after the files it speaks of are on the disk, so they are as it says, or longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import msgspec

from psyche.data.index import TokenizerFile
from psyche.data.shards import SplitState, intact
from psyche.durable import write_durably
from psyche.numerics.digest import blob_root, digest

JOURNAL = "journal.json"


class Journal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Plain facts; the files beside it hold the rest."""

    shard_bytes: int
    tokenizer: tuple[TokenizerFile, ...]
    total: int | None
    """Documents in the corpus, where the tokenizer's training has counted them."""
    documents: int = 0
    """Documents whose tokens are in the splits."""
    seen: str = ""
    """Hash chain over these documents: a source that changed meanwhile is noticed, not mixed in."""
    train: SplitState = SplitState()
    heldout: SplitState = SplitState()

    def save(self, directory: Path) -> None:
        write_durably(directory / JOURNAL, msgspec.json.encode(self))

    def skip(self, stream: Iterator[str]) -> bool:
        """Advance ``stream`` past the documents that are done; False if they are not those that were read then."""
        count, seen = 0, ""
        for text in islice(stream, self.documents):
            count, seen = count + 1, chain(seen, document_hash(text))
        return (count, seen) == (self.documents, self.seen)


def load_journal(directory: Path, tokenizer: Path, shard_bytes: int) -> Journal | None:
    """The journal in ``directory``, if there is one and every file is what it says."""
    try:
        journal = msgspec.json.decode((directory / JOURNAL).read_bytes(), type=Journal)
        sound = (
            journal.shard_bytes == shard_bytes
            and all(blob_root((tokenizer / item.file).read_bytes()).hex() == item.root for item in journal.tokenizer)
            and intact(directory, "train", journal.train)
            and intact(directory, "heldout", journal.heldout)
        )
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return journal if sound else None


def document_hash(text: str) -> bytes:
    """32 bytes; decides the split of a document, and whether it is the one that was read before."""
    return digest("document", text.encode())


def chain(seen: str, document: bytes) -> str:
    """Hash of the documents so far and one more, hex."""
    return digest("documents", bytes.fromhex(seen), document).hex()
