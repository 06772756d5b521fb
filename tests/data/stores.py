"""Stores read back in the order of their documents."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from psyche.data.shards import order
from psyche.data.token_store import Split, TokenStore


def staged(store: TokenStore, name: str) -> np.ndarray:
    """The sequences of a split in the order in which they were made of documents: the shuffle undone."""
    split: Split = getattr(store, name)
    rows = np.empty((len(split), store.sequence_length), np.int64)
    rows[order(name, range(len(split)), len(split))] = split.batch(range(len(split)))
    return rows


def documents(store: TokenStore, name: str) -> list[np.ndarray]:
    """The tokens of a packed split's whole documents; what the dropped tail cut short is left out."""
    stream = staged(store, name).ravel()
    return np.split(stream, np.flatnonzero(stream == store.index.eos) + 1)[:-1]


def decoded(store: TokenStore, name: str) -> list[str]:
    """The same as text."""
    tokenizer = Tokenizer.from_file(str(store.tokenizer_path / "tokenizer.json"))
    return [tokenizer.decode(document[:-1].tolist()) for document in documents(store, name)]
