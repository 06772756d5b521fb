"""Documents to tokens: what ``psyche data prepare`` spends its time on, kept busy and within bounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import NamedTuple

from psyche.data.packing import Tokens
from psyche.data.tokenizer import Encoder
from psyche.numerics.digest import digest

BATCH_CHARACTERS = 1 << 20
"""Text encoded at once: enough to keep all cores busy, little enough to forget."""

AHEAD = 2
"""Batches on their way while one is used: one encodes, one of Python's single thread is made ready."""


class Document(NamedTuple):
    key: bytes
    """Its :func:`document_hash`."""
    bytes: int
    """Of its text in UTF-8."""
    tokens: Tokens
    """With the one that ends it."""


def document_hash(text: str) -> bytes:
    """32 bytes; decides the split of a document, and whether it is the one that was read before."""
    return digest("document", text.encode())


def encoded(texts: Iterator[str], encoder: Encoder, pool: Executor) -> Iterator[Document]:
    """Every text encoded, in order. While its documents are used, ``pool`` encodes the next ``AHEAD`` batches."""
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
    """Consecutive texts of about ``BATCH_CHARACTERS`` together."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
