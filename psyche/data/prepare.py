"""Turning a corpus into a token store: read, mix, encode, pack, shuffle, hash. It resumes after a kill at any moment.

First every document is encoded, and its tokens are appended to ``staging/`` in document order; a journal says how much
of them is on disk. Then the staged sequences are shuffled into shards. ``index.json`` is written last and makes the
directory a store. Anything beyond the journal is truncated and made again, byte for byte: every step depends on the
documents alone.

Memory is bounded by a few batches of text and one shard, disk by twice the tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import msgspec
from filelock import FileLock, Timeout

from psyche.config import BpeTokenizer, Data, MixturePart, MixtureSource
from psyche.data.encoding import AHEAD, Document, document_hash, encoded
from psyche.data.index import DTYPES, FORMAT, Index, Shard, TokenizerFile, dtype_for
from psyche.data.shards import SHARD_BYTES, Staged, require_room, write_shards
from psyche.data.sources import Part, documents, interleave, parts_of
from psyche.data.staging import PartState, PreparationJournal, SplitState, SplitWriter, load_journal
from psyche.data.token_store import INDEX, TOKENIZER, TokenStore, store_path
from psyche.data.tokenizer import Encoder, tokenizer_files
from psyche.durable import disk_errors, write_durably
from psyche.errors import PsycheError
from psyche.numerics.digest import blob_root

STAGING = "staging"

JOURNAL_BYTES = 64 << 20
"""Staged bytes between two saves of the journal: the most that a crash costs, about half a minute of work."""


@dataclass(frozen=True)
class Progress:
    """The progress of the current stage."""

    stage: Literal["waiting", "tokenizer", "merges", "tokens", "shuffle"]
    """Waiting for another process that prepares the same store; reading documents for the tokenizer; training the
    tokenizer; encoding; shuffling."""
    done: int = 0
    """Documents, including those of an interrupted preparation; sequences in the shuffle stage."""
    total: int | None = None
    """Total number of the same, if known."""
    tokens: int = 0
    """Tokens encoded, or shuffled, by this process."""
    bytes: int = 0
    """Bytes of UTF-8 text encoded by this process."""

    def after(self, document: Document) -> Progress:
        return replace(
            self, done=self.done + 1, tokens=self.tokens + len(document.tokens), bytes=self.bytes + document.bytes
        )


Report = Callable[[Progress], None]


def prepare(
    data: Data, cache: Path, *, vocab_limit: int, progress: Report | None = None, shard_bytes: int = SHARD_BYTES
) -> TokenStore:
    """Create the token store of ``data`` under ``cache``, or open the existing one.

    An existing store is not compared with its source again: delete its directory to prepare changed text.
    Raises :class:`PsycheError` if the source, the tokenizer or the disk fails, or if the vocabulary is larger than
    ``vocab_limit``, the size of the model's embeddings.
    """
    if isinstance(data.tokenizer, BpeTokenizer):
        _refuse_large(data.tokenizer.vocab_size, vocab_limit)
    report = progress or (lambda _: None)
    path = store_path(cache, data)
    with disk_errors(path), _alone(path, report):
        if not ((path / INDEX).exists() and TokenStore.open(path).complete()):
            _build(data, path, vocab_limit, report, shard_bytes)
        shutil.rmtree(path / STAGING, ignore_errors=True)
    store = TokenStore.open(path)
    _refuse_large(store.vocab_size, vocab_limit)
    return store


def is_heldout(document: bytes, fraction: float) -> bool:
    """Return whether a document is held out, by its :func:`document_hash` alone: copies fall into the same split."""
    return int.from_bytes(document[:8], "little") < int(fraction * 2**64)


@contextmanager
def _alone(path: Path, report: Report) -> Iterator[None]:
    """Hold the store's lock, which the kernel releases when the process ends."""
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
            f"the tokenizer has {vocab_size} tokens, the model has only {limit} embeddings: set "
            f"model.settings.vocab_size to {vocab_size} or more, or choose a smaller data.tokenizer"
        )


# ------------------------------------------------------------------------------------------ building


def _build(data: Data, path: Path, vocab_limit: int, report: Report, shard_bytes: int) -> None:
    staging = path / STAGING
    journal, streams = load_journal(staging, path / TOKENIZER), _streams(data)
    if journal is None or not (journal.encoded or journal.skip(streams)):
        if path.exists():
            shutil.rmtree(path)  # delete, never overwrite: a process may have mapped the files
        (path / TOKENIZER).mkdir(parents=True)
        staging.mkdir()
        journal, streams = _make_tokenizer(data, path, report), _streams(data)
    encoder = Encoder.load(path / TOKENIZER)
    _refuse_large(encoder.vocab_size, vocab_limit)
    if not journal.encoded:
        journal = _encode(data, staging, streams, encoder, journal, report)
    if not (journal.train.sequences and journal.heldout.sequences):
        raise PsycheError(
            f"the {'held-out' if journal.train.sequences else 'training'} split is empty: provide more or smaller "
            "documents (a dataset of kind text makes one of every line), change data.heldout_fraction, or shorten "
            "data.sequence_length"
        )
    index = _shuffle(data, path, encoder, journal, report, shard_bytes)
    write_durably(path / INDEX, index.encode())


def _streams(data: Data) -> list[Iterator[str]]:
    """Return the documents of each part of the source."""
    return [documents(part.source, None) for part in parts_of(data.source)[0]]


def _make_tokenizer(data: Data, path: Path, report: Report) -> PreparationJournal:
    """Train or load the tokenizer, write its files, and return the first journal."""
    read, total = 0, data.max_documents

    def training_texts() -> Iterator[str]:
        nonlocal read, total
        try:
            for text in documents(data.source, data.max_documents):
                read += 1
                if not is_heldout(document_hash(text), data.heldout_fraction):  # train only on training text
                    yield text
                report(Progress("tokenizer", read, data.max_documents))
            if not isinstance(data.source, MixtureSource):  # a mixture ends elsewhere once it is weighed by tokens
                total = read
        finally:  # also if the trainer stops after a sample
            report(Progress("merges"))

    files = tokenizer_files(data.tokenizer, training_texts())
    for name, content in files.items():
        write_durably(path / TOKENIZER / name, content)
    listed = [TokenizerFile(name, len(files[name]), blob_root(files[name]).hex()) for name in sorted(files)]
    journal = PreparationJournal(tuple(listed), total, tuple(PartState() for _ in parts_of(data.source)[0]))
    journal.save(path / STAGING)
    return journal


def _encode(
    data: Data,
    staging: Path,
    streams: list[Iterator[str]],
    encoder: Encoder,
    journal: PreparationJournal,
    report: Report,
) -> PreparationJournal:
    """Encode the rest of the corpus into the staging files, saving the journal every JOURNAL_BYTES."""

    def writer(split: str, state: SplitState) -> SplitWriter:
        dtype = DTYPES[dtype_for(encoder.vocab_size)]
        return SplitWriter(staging / split, dtype, data.sequence_length, data.packing, state)

    def save(journal: PreparationJournal, *, encoded: bool = False) -> PreparationJournal:
        saved = msgspec.structs.replace(journal, train=train.sync(), heldout=heldout.sync(), encoded=encoded)
        saved.save(staging)
        require_room(staging, train.bytes + heldout.bytes)  # for the shuffle: fail now, not after hours
        return saved

    progress = Progress("tokens", journal.documents, journal.total)
    with (
        ThreadPoolExecutor(AHEAD, "encode") as pool,
        closing(writer("train", journal.train)) as train,
        closing(writer("heldout", journal.heldout)) as heldout,
    ):
        for number, passes, document in _mixed(data, streams, journal, encoder, pool):
            (heldout if is_heldout(document.key, data.heldout_fraction) else train).add(document.tokens)
            journal = journal.after(number, document, passes)
            if train.bytes + heldout.bytes >= journal.train.bytes + journal.heldout.bytes + JOURNAL_BYTES:
                journal = save(journal)
            progress = progress.after(document)
            report(progress)
        return save(journal, encoded=True)


def _mixed(
    data: Data, streams: list[Iterator[str]], journal: PreparationJournal, encoder: Encoder, pool: Executor
) -> Iterator[tuple[int, int, Document]]:
    """Yield the encoded documents that are not in ``journal`` yet, mixed by tokens.

    Each comes as (number of its part, complete passes over that part, document).
    """

    def part(spec: MixturePart, stream: Iterator[str], state: PartState) -> Part[Document]:
        def again() -> Iterator[Document]:
            return encoded(documents(spec.source, None), encoder, pool)

        return Part(spec.weight, again, encoded(stream, encoder, pool), state.tokens, state.passes)

    specs, stop = parts_of(data.source)
    parts = [part(*one) for one in zip(specs, streams, journal.parts, strict=True)]
    turns = interleave(parts, lambda document: len(document.tokens), stop)
    left = None if data.max_documents is None else data.max_documents - journal.documents
    return ((number, parts[number].passes, document) for number, document in islice(turns, left))


def _shuffle(
    data: Data, path: Path, encoder: Encoder, journal: PreparationJournal, report: Report, shard_bytes: int
) -> Index:
    progress = Progress("shuffle", 0, journal.train.sequences + journal.heldout.sequences)

    def done(sequences: int) -> None:
        nonlocal progress
        progress = replace(
            progress, done=progress.done + sequences, tokens=progress.tokens + sequences * data.sequence_length
        )
        report(progress)

    def shards(split: str, state: SplitState) -> tuple[Shard, ...]:
        staged = Staged(path / STAGING / split, state.sequences, data.sequence_length, DTYPES[dtype])
        return write_shards(path, split, staged, shard_bytes, done)

    dtype = dtype_for(encoder.vocab_size)
    report(progress)
    return Index(
        format=FORMAT,
        sequence_length=data.sequence_length,
        dtype=dtype,
        vocab_size=encoder.vocab_size,
        eos=encoder.eos,
        packing=data.packing,
        tokenizer=journal.tokenizer,
        train=shards("train", journal.train),
        heldout=shards("heldout", journal.heldout),
    )
