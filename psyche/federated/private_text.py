"""A node's own text, as tokens on its own disk: no blob, index or hash of it is to be had from outside."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from psyche.data.encoding import batches
from psyche.data.index import DTYPES, Index
from psyche.data.staging import SplitState, SplitWriter
from psyche.data.tokenizer import Encoder
from psyche.durable import close_to_others, disk_errors, write_durably
from psyche.errors import PsycheError

TOKENS = "tokens.bin"
DESCRIPTION = "private.json"
MAX_DOCUMENT_BYTES = 16 << 20
"""A document is encoded in one piece, which takes a hundred times its size in memory."""


class _Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of what the tokens were made: while this is as it was, they are not made again."""

    tokenizer: tuple[str, ...]
    """Hashes of its files."""
    sequence_length: int
    packing: str
    files: tuple[tuple[str, int, int], ...]
    """Path, bytes and modification time in ns of each."""


class _Line(msgspec.Struct):
    """Of a ``.jsonl`` file; other fields are allowed and not read."""

    text: str


class PrivateText:
    """Sequences of the run's length, of text that stays here."""

    def __init__(self, sequences: NDArray[np.unsignedinteger], random: np.random.Generator | None = None) -> None:
        """``sequences`` is ``[count, sequence_length]``; their order is ``random``, by default the system's."""
        self._sequences = sequences
        self._random = np.random.default_rng(secrets.randbits(256)) if random is None else random
        self._order = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._sequences)

    def batch(self, size: int) -> NDArray[np.int64]:
        """The next ``size`` sequences, ``[size, sequence_length]``: each comes once before any comes again."""
        while len(self._order) < size:
            self._order = np.concatenate([self._order, self._random.permutation(len(self))])
        chosen, self._order = self._order[:size], self._order[size:]
        return self._sequences[chosen].astype(np.int64)


def prepare_private(source: Path, directory: Path, index: Index, tokenizer: Path) -> PrivateText:
    """The text below ``source`` as sequences, encoded by the run's tokenizer into ``directory``, which is closed to
    other users of the machine.

    ``source`` holds UTF-8 text files, each a document, and ``.jsonl`` files, each line one by its field ``text``;
    hidden files are left out. Documents become sequences as the run's own did. Raises :class:`PsycheError` where there
    are none, one cannot be read, or they do not fill one sequence. No message quotes any of the text.
    """
    files = _files(source)
    described = _Description(
        tuple(item.root for item in index.tokenizer),
        index.sequence_length,
        index.packing,
        tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files),
    )
    target, description = directory / TOKENS, directory / DESCRIPTION
    with disk_errors(directory, "--directory"):
        close_to_others(directory)
        if (
            not target.exists()
            or not description.exists()
            or description.read_bytes() != msgspec.json.encode(described)
        ):
            description.unlink(missing_ok=True)
            _encode(files, target, index, Encoder.load(tokenizer))
            write_durably(description, msgspec.json.encode(described))
    tokens = np.memmap(target, dtype=DTYPES[index.dtype], mode="r") if target.stat().st_size else np.empty(0, np.uint16)
    if not len(tokens):
        raise PsycheError(
            f"the text in {source} does not fill one sequence of {index.sequence_length} tokens: add more"
        )
    return PrivateText(tokens.reshape(-1, index.sequence_length))


def _encode(files: list[Path], target: Path, index: Index, encoder: Encoder) -> None:
    """Replace ``target`` by the sequences of all ``files``."""
    temporary = target.with_suffix(".tmp")
    writer = SplitWriter(temporary, DTYPES[index.dtype], index.sequence_length, index.packing, SplitState())
    with closing(writer):
        for batch in batches(text for path in files for text in _documents(path)):
            for document in encoder.encode(batch):
                writer.add(document)
        writer.sync()
    os.replace(temporary, target)


def _files(source: Path) -> list[Path]:
    source = source.expanduser().absolute()
    if not source.is_dir():
        raise PsycheError(f"{source} is not a directory: --private-data names the one that holds the text")
    found = [
        path
        for path in sorted(source.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(source).parts)
    ]
    if not found:
        raise PsycheError(f"there is no file in {source}: --private-data names the directory that holds the text")
    return found


def _documents(path: Path) -> Iterator[str]:
    lines, number = path.suffix == ".jsonl", 0
    try:
        with path.open("rb") as file:
            for content in file if lines else [file.read(MAX_DOCUMENT_BYTES + 1)]:
                number += 1
                if len(content) > MAX_DOCUMENT_BYTES:
                    raise PsycheError(f"{path} has a document of more than {MAX_DOCUMENT_BYTES >> 20} MiB: split it")
                if content.strip():
                    yield msgspec.json.decode(content, type=_Line).text if lines else content.decode()
    except OSError as error:
        raise PsycheError(f"cannot read {path}: {error.strerror}") from None
    except msgspec.DecodeError:
        raise PsycheError(f'line {number} of {path} is not {{"text": "…"}}: correct it, or take it away') from None
    except UnicodeDecodeError as error:
        raise PsycheError(f"{path} is not UTF-8 text (byte {error.start}): convert it, or take it away") from None
