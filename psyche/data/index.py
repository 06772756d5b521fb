"""``index.json`` of a token store: the on-disk format, and the 32-byte root that identifies a store.

A store is a directory::

    index.json          this file, canonical: equal stores give equal bytes
    tokenizer/          what ``AutoTokenizer.from_pretrained`` loads
    train-00000.bin     a shard: sequences of ``sequence_length`` little-endian tokens, back to back, no header
    heldout-00000.bin

All shards of a split but the last hold the same number of sequences, and a split's sequences are in random order.

An index may come from a peer, so every field is bounded and a file name cannot leave the directory.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from psyche.errors import PsycheError
from psyche.numerics.digest import digest

FORMAT: Final = 2
DTYPES = {"uint16": "<u2", "uint32": "<u4"}
"""NumPy dtypes by their name in the index. Tokens on disk are little-endian."""
MAX_INDEX_BYTES = 32 << 20
"""Room for some 200,000 shards: 1.6 TiB of tokens."""

Count = Annotated[int, Meta(ge=1, le=2**48)]
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")]
Root = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class TokenizerFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of ``tokenizer/``; ``root`` is the hex blob root of its bytes."""

    file: FileName
    bytes: Count
    root: Root


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One shard; ``root`` is the hex blob root of its bytes, so that it can be served as a blob."""

    file: FileName
    sequences: Count
    bytes: Count
    root: Root


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of ``index.json``. Sequences are numbered through the shards of a split, in their order here."""

    format: Literal[2]
    sequence_length: Annotated[int, Meta(ge=1, le=2**24)]
    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Meta(ge=1, le=2**31)]
    eos: Annotated[int, Meta(ge=0, lt=2**31)]
    """The token that ends every document."""
    tokenizer: tuple[TokenizerFile, ...]
    train: tuple[Shard, ...]
    heldout: tuple[Shard, ...]
    packing: Literal["pack", "pad"] = "pack"
    """How documents were cut into sequences, see :class:`~psyche.config.Data`."""

    @property
    def sequence_bytes(self) -> int:
        return self.sequence_length * (2 if self.dtype == "uint16" else 4)

    @property
    def pad(self) -> int | None:
        """The padding token, of which only the first in a sequence is learned; None without padding.

        ``training/labels.py`` masks the others.
        """
        return self.eos if self.packing == "pad" else None

    def encode(self) -> bytes:
        """Canonical JSON: keys sorted, no spaces."""
        return msgspec.json.encode(self, order="sorted")

    @property
    def root(self) -> bytes:
        """The store's identity, 32 bytes: every shard, the tokenizer, their order."""
        return digest("store", self.encode())


def dtype_for(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Return the smallest token type that holds the ids of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def decode_index(data: bytes, where: str) -> Index:
    """Inverse of :meth:`Index.encode`. Raises :class:`PsycheError` (``where`` names the origin) on anything else."""
    try:
        index = msgspec.json.decode(data, type=Index)
        fault = _fault(index, data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        fault = str(error)
    if fault:
        raise PsycheError(
            f"{where} is not the index of a token store ({fault}): delete its directory and run "
            "`psyche data prepare` again"
        )
    return index


def _fault(index: Index, data: bytes) -> str | None:
    """Return the fault of a well-typed index, or None."""
    if len(data) > MAX_INDEX_BYTES or index.encode() != data:
        return "not in canonical form"
    if index.dtype != dtype_for(index.vocab_size) or index.eos >= index.vocab_size:
        return "vocab_size, eos and dtype are inconsistent"
    shards = index.train + index.heldout
    for shard in shards:
        if shard.bytes != shard.sequences * index.sequence_bytes:
            return f"{shard.file} cannot hold {shard.sequences} sequences in {shard.bytes} bytes"
    for split in (index.train, index.heldout):  # protocol/assignment.py relies on it
        if any(shard.sequences != split[0].sequences for shard in split[:-1]) or (
            split and split[-1].sequences > split[0].sequences
        ):
            return "shards other than the last differ in size"
    for files in ([shard.file for shard in shards], [item.file for item in index.tokenizer]):
        if len(set(files)) != len(files):
            return "a file is listed twice"
    return None
