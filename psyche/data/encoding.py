"""From documents to tokens, with all cores busy and memory bounded, and from tokens to sequences of one length."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from psyche.data.tokenizer import Encoder
from psyche.numerics.digest import digest

Tokens = NDArray[np.unsignedinteger]

BATCH_CHARACTERS = 1 << 20
"""Characters encoded at once: enough to keep all cores busy, little enough for memory not to matter."""

AHEAD = 2
"""Batches prepared while one is used: one is being encoded, the other is being read."""


class Document(NamedTuple):
    key: bytes
    """The document's :func:`document_hash`."""
    bytes: int
    """Length of the text in UTF-8."""
    tokens: Tokens
    """Token ids, including the final end-of-document token."""


def document_hash(text: str) -> bytes:
    """32-byte hash of a document: it decides the split, and detects a source that changed between two reads."""
    return digest("document", text.encode())


def encoded(texts: Iterator[str], encoder: Encoder, pool: Executor) -> Iterator[Document]:
    """Encode every text, in order; ``pool`` encodes the next ``AHEAD`` batches meanwhile."""
    ahead: deque[Future[list[Document]]] = deque()
    for batch in batches(texts):
        ahead.append(pool.submit(_encode, batch, encoder))
        if len(ahead) > AHEAD:
            yield from ahead.popleft().result()
    while ahead:
        yield from ahead.popleft().result()


def _encode(texts: list[str], encoder: Encoder) -> list[Document]:
    return [
        Document(document_hash(text), len(text.encode()), tokens)
        for text, tokens in zip(texts, encoder.encode(texts), strict=True)
    ]


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Group consecutive texts into batches of about ``BATCH_CHARACTERS``."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def pack(stream: Tokens, width: int) -> tuple[Tokens, Tokens]:
    """Cut ``stream`` (concatenated documents) into rows ``[n, width]``; return them and the remaining tokens."""
    whole = len(stream) // width * width
    return stream[:whole].reshape(-1, width), stream[whole:]


def pad(document: Tokens, width: int) -> Tokens:
    """Cut one document, which ends with its end token, into rows ``[n, width]``, padded with the end token.

    A row of nothing but the end token is left out: it has nothing to predict.
    """
    end = document[-1]
    count = -(-(len(document) - 1) // width)
    rows = np.full(count * width, end, dtype=document.dtype)
    kept = min(len(document), len(rows))
    rows[:kept] = document[:kept]
    return rows.reshape(count, width)
