"""A node's private text as tokens on its own disk. No blob, index or hash of it is served."""

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
from psyche.durable import disk_errors, make_private_directory, write_durably
from psyche.errors import PsycheError

TOKENS = "tokens.bin"
DESCRIPTION = "private.json"
MAX_DOCUMENT_BYTES = 16 << 20
"""Maximum size of a document: it is tokenised as one piece, which takes a hundred times its size in memory."""


class _Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The inputs of the tokenised text. It is tokenised again if they change."""

    tokenizer: tuple[str, ...]
    """Hashes of the tokenizer's files."""
    sequence_length: int
    packing: str
    files: tuple[tuple[str, int, int], ...]
    """Path, size in bytes and modification time in ns of each source file."""


class _Line(msgspec.Struct):
    """A line of a ``.jsonl`` file. Other fields are ignored."""

    text: str


class PrivateText:
    """Private sequences of the run's sequence length."""

    def __init__(self, sequences: NDArray[np.unsignedinteger], random: np.random.Generator | None = None) -> None:
        """``sequences`` is ``[count, sequence_length]``; ``random`` shuffles them, by default seeded by the system."""
        self._sequences = sequences
        self._random = np.random.default_rng(secrets.randbits(256)) if random is None else random
        self._order = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._sequences)

    def batch(self, size: int) -> NDArray[np.int64]:
        """Return the next ``size`` sequences, ``[size, sequence_length]``: each is used once before any repeats."""
        while len(self._order) < size:
            self._order = np.concatenate([self._order, self._random.permutation(len(self))])
        chosen, self._order = self._order[:size], self._order[size:]
        return self._sequences[chosen].astype(np.int64)


def prepare_private(source: Path, directory: Path, index: Index, tokenizer: Path) -> PrivateText:
    """Tokenise the text below ``source`` with the run's tokenizer into ``directory``, closed to other users.

    ``source`` holds UTF-8 text files, one document each, and ``.jsonl`` files with a document in the field ``text`` of
    each line; hidden files are skipped. Documents are packed as in the run's data. Raises :class:`PsycheError` if there
    is no file, one cannot be read, or the text does not fill one sequence. No error message quotes the text.
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
        make_private_directory(directory)
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
    """Replace ``target`` with the sequences of all ``files``."""
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
        raise PsycheError(f"{source} is not a directory: --private-data takes the directory of the text")
    found = [
        path
        for path in sorted(source.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(source).parts)
    ]
    if not found:
        raise PsycheError(f"{source} contains no file: --private-data takes the directory of the text")
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
        raise PsycheError(f'line {number} of {path} is not {{"text": "…"}}: correct or remove it') from None
    except UnicodeDecodeError as error:
        raise PsycheError(f"{path} is not UTF-8 text (byte {error.start}): convert or remove it") from None
