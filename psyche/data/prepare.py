"""Turn a corpus into a token store: read, split, encode, pack, hash. Killed at any moment, it goes on where it was.

``index.json`` is written last, and makes the directory a store. Until then the journal says how far the files can
be believed. Whatever lies beyond is cut off and made again, to the same bytes: every step depends on the documents
alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from filelock import FileLock, Timeout

from psyche.config import BpeTokenizer, Data
from psyche.data.index import DTYPES, FORMAT, Index, Shard, TokenizerFile, dtype_for
from psyche.data.journal import JOURNAL, Journal, chain, document_hash, load_journal
from psyche.data.shards import SHARD_BYTES, SplitState, SplitWriter
from psyche.data.sources import documents
from psyche.data.store import INDEX, TOKENIZER, TokenStore, store_path
from psyche.data.tokenizer import Encoder, tokenizer_files
from psyche.durable import disk_errors, write_durably
from psyche.errors import PsycheError
from psyche.numerics.digest import blob_root

BATCH_CHARACTERS = 1 << 20
"""Text encoded at once: enough to keep all cores busy, little enough to forget."""


@dataclass(frozen=True)
class Progress:
    """``documents`` and ``tokens`` count what the current stage has done; ``total`` documents where that is known."""

    stage: Literal["waiting", "tokenizer", "tokens"]
    """Waiting for another process that prepares the same store; reading for the tokenizer; encoding."""
    documents: int = 0
    total: int | None = None
    tokens: int = 0


Report = Callable[[Progress], None]


def prepare(
    data: Data, cache: Path, *, vocab_limit: int, progress: Report | None = None, shard_bytes: int = SHARD_BYTES
) -> TokenStore:
    """Make the token store of ``data`` under ``cache``, or open it if it is there.

    A store that is there is not compared with its source again: delete its directory to prepare changed text anew.
    Raises :class:`PsycheError` where the source, the tokenizer or the disk does not allow it, or where the
    vocabulary is larger than ``vocab_limit``, the model's.
    """
    if isinstance(data.tokenizer, BpeTokenizer):
        _refuse_large(data.tokenizer.vocab_size, vocab_limit)
    report = progress or (lambda _: None)
    path = store_path(cache, data)
    with disk_errors(path), _alone(path, report):
        if not ((path / INDEX).exists() and TokenStore.open(path).whole()):
            _build(data, path, vocab_limit, report, shard_bytes)
    store = TokenStore.open(path)
    _refuse_large(store.vocab_size, vocab_limit)
    return store


def is_heldout(document: bytes, fraction: float) -> bool:
    """The split of a document, by its :func:`document_hash` alone: copies of it fall on the same side."""
    return int.from_bytes(document[:8], "little") < int(fraction * 2**64)


@contextmanager
def _alone(path: Path, report: Report) -> Iterator[None]:
    """Hold the store's lock, which the kernel releases however the holder ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        report(Progress("waiting"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _refuse_large(vocab_size: int, limit: int) -> None:
    if vocab_size > limit:
        raise PsycheError(
            f"the tokenizer has {vocab_size} tokens, the model has embeddings for {limit}: set "
            f"model.settings.vocab_size to {vocab_size} or more, or choose a smaller data.tokenizer"
        )


# ------------------------------------------------------------------------------------------ building


def _build(data: Data, path: Path, vocab_limit: int, report: Report, shard_bytes: int) -> None:
    journal = None if (path / INDEX).exists() else load_journal(path, path / TOKENIZER, shard_bytes)
    stream = documents(data.source, data.max_documents)
    if journal is None or not journal.skip(stream):
        if path.exists():
            shutil.rmtree(path)  # unlinked, never overwritten: a process may have mapped the files
        (path / TOKENIZER).mkdir(parents=True)
        journal = _make_tokenizer(data, path, report, shard_bytes)
        stream = documents(data.source, data.max_documents)
    encoder = Encoder.load(path / TOKENIZER)
    _refuse_large(encoder.vocab_size, vocab_limit)
    train, heldout = _encode(data, path, stream, encoder, journal, report)
    if not (train and heldout):
        raise PsycheError(
            f"the {'held-out' if train else 'training'} split is empty: give more or smaller documents (a dataset of "
            "kind text makes one of every line), change data.heldout_fraction, or shorten data.sequence_length"
        )
    index = Index(
        format=FORMAT,
        sequence_length=data.sequence_length,
        dtype=dtype_for(encoder.vocab_size),
        vocab_size=encoder.vocab_size,
        eos=encoder.eos,
        tokenizer=journal.tokenizer,
        train=train,
        heldout=heldout,
    )
    write_durably(path / INDEX, index.encode())
    (path / JOURNAL).unlink()


def _make_tokenizer(data: Data, path: Path, report: Report, shard_bytes: int) -> Journal:
    """Write the tokenizer's files and the first journal."""
    read, total = 0, data.max_documents

    def training_texts() -> Iterator[str]:
        nonlocal read, total
        for text in documents(data.source, data.max_documents):
            read += 1
            if not is_heldout(document_hash(text), data.heldout_fraction):  # nor may it shape the tokenizer
                yield text
            report(Progress("tokenizer", read, total))
        total = read

    files = tokenizer_files(data.tokenizer, training_texts())
    for name, content in files.items():
        write_durably(path / TOKENIZER / name, content)
    listed = [TokenizerFile(name, len(files[name]), blob_root(files[name]).hex()) for name in sorted(files)]
    journal = Journal(shard_bytes, tuple(listed), total)
    journal.save(path)
    return journal


def _encode(
    data: Data, path: Path, stream: Iterator[str], encoder: Encoder, journal: Journal, report: Report
) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
    """Encode the rest of the corpus, moving the journal on whenever a shard is full. Returns the splits' shards."""

    def writer(split: str, state: SplitState) -> SplitWriter:
        dtype = DTYPES[dtype_for(encoder.vocab_size)]
        return SplitWriter(path, split, dtype, data.sequence_length, journal.shard_bytes, state)

    read, seen, tokens = journal.documents, journal.seen, 0
    with closing(writer("train", journal.train)) as train, closing(writer("heldout", journal.heldout)) as heldout:
        for batch in _batches(stream):
            shards = train.full_shards + heldout.full_shards
            for text, ids in zip(batch, encoder.encode(batch), strict=True):
                document = document_hash(text)
                (heldout if is_heldout(document, data.heldout_fraction) else train).add(ids)
                read, seen, tokens = read + 1, chain(seen, document), tokens + len(ids)
            if train.full_shards + heldout.full_shards > shards:
                states = {"train": train.sync(), "heldout": heldout.sync()}
                msgspec.structs.replace(journal, documents=read, seen=seen, **states).save(path)
            report(Progress("tokens", read, journal.total, tokens))
        return train.finish(), heldout.finish()


def _batches(stream: Iterator[str]) -> Iterator[list[str]]:
    """Consecutive documents of about ``BATCH_CHARACTERS`` together."""
    batch, size = [], 0
    for text in stream:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
