"""Read a token store: any sequence by its index, in constant time, never a byte that was not checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from psyche.config import Data, NamedTokenizer
from psyche.data.index import DTYPES, FORMAT, MAX_INDEX_BYTES, Index, Shard, TokenizerFile, decode_index
from psyche.data.sources import absolute, meant_here
from psyche.errors import PsycheError
from psyche.numerics.digest import blob_root, digest

INDEX = "index.json"
TOKENIZER = "tokenizer"


def store_path(cache: Path, data: Data) -> Path:
    """Where the store of a recipe lives on this machine: ``cache/data/<16 hex digits of the recipe's hash>``.

    The recipe says *how*; the same words can mean other bytes here than elsewhere. So what the source refers to on
    this machine (the interpreter's version, the absolute path behind a relative one) is part of the hash.
    """
    meant = meant_here(data.source)
    if isinstance(data.tokenizer, NamedTokenizer):
        meant.append(absolute(data.tokenizer.name))
    recipe = msgspec.msgpack.encode([FORMAT, data.model_dump(mode="json"), meant], order="sorted")
    return cache.expanduser() / "data" / digest("store recipe", recipe).hex()[:16]


class Split:
    """The sequences of one split, numbered from 0."""

    def __init__(self, directory: Path, index: Index, shards: tuple[Shard, ...]) -> None:
        self.shards = shards
        self._directory = directory
        self._index = index
        self._ends = np.cumsum([shard.sequences for shard in shards], dtype=np.int64)
        self._mapped: dict[int, NDArray[np.unsignedinteger]] = {}

    def __len__(self) -> int:
        """Sequences in the split."""
        return int(self._ends[-1]) if self.shards else 0

    def batch(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """Sequences ``indices``, in the order given: int64 ``[len(indices), sequence_length]``.

        A shard is hashed at its first use in this process, then read through a memory map. Raises
        :class:`PsycheError` for a shard that is missing or corrupt, :class:`IndexError` for an index outside the split.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"sequences {wanted.min()}..{wanted.max()} asked of a split of {len(self)}")
        out = np.empty((len(wanted), self._index.sequence_length), dtype=np.int64)
        shard_of = np.searchsorted(self._ends, wanted, side="right")
        for number in np.unique(shard_of):
            rows = shard_of == number
            first = self._ends[number] - self.shards[number].sequences
            out[rows] = self._shard(int(number))[wanted[rows] - first]
        return out

    def _shard(self, number: int) -> NDArray[np.unsignedinteger]:
        if number not in self._mapped:  # two threads may both check it: wasteful once, never wrong
            shard = self.shards[number]
            self._mapped[number] = _map_checked(self._directory / shard.file, shard, self._index)
        return self._mapped[number]


class TokenStore:
    """A finished store. ``train`` and ``heldout`` are its splits; no document is in both."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path = path
        self.index = index
        self.root = index.root
        self.sequence_length = index.sequence_length
        self.vocab_size = index.vocab_size
        self.train = Split(path, index, index.train)
        self.heldout = Split(path, index, index.heldout)
        self._tokenizer_checked = False

    @classmethod
    def open(cls, path: Path, root: bytes | None = None) -> TokenStore:
        """Open the store in directory ``path``; no shard is read yet.

        Raises :class:`PsycheError` where there is none, its index is malformed, or its root is not ``root``.
        """
        try:
            with (path / INDEX).open("rb") as file:
                content = file.read(MAX_INDEX_BYTES + 1)
        except FileNotFoundError:
            raise PsycheError(f"there is no token store at {path}: run `psyche data prepare` first") from None
        except OSError as error:
            raise PsycheError(f"cannot read {path / INDEX} ({error.strerror}): check its permissions") from error
        index = decode_index(content, str(path / INDEX))
        if root is not None and index.root != root:
            raise PsycheError(
                f"the token store at {path} has root {index.root.hex()}, the run is fixed to {root.hex()}: it was "
                "prepared from other text (another Python, changed files); copy the store of the run's author there"
            )
        return cls(path, index)

    @property
    def tokenizer_path(self) -> Path:
        """A directory that ``AutoTokenizer.from_pretrained`` loads. Raises :class:`PsycheError` if it was altered."""
        if not self._tokenizer_checked:
            for item in self.index.tokenizer:
                _check(self.path / TOKENIZER / item.file, item)
            self._tokenizer_checked = True
        return self.path / TOKENIZER

    def verify(self, sound: Callable[[Path], None] = lambda _: None) -> None:
        """Hash every file again, telling ``sound`` each good one; :class:`PsycheError` names the first that is not."""
        for item in self.index.tokenizer:
            _check(self.path / TOKENIZER / item.file, item)
            sound(self.path / TOKENIZER / item.file)
        for shard in self.index.train + self.index.heldout:
            _map_checked(self.path / shard.file, shard, self.index)
            sound(self.path / shard.file)

    def whole(self) -> bool:
        """Whether every file is there with its right size; reads none of them."""
        files = [(self.path / TOKENIZER / item.file, item.bytes) for item in self.index.tokenizer]
        files += [(self.path / shard.file, shard.bytes) for shard in self.index.train + self.index.heldout]
        return all(file.is_file() and file.stat().st_size == size for file, size in files)


def _map_checked(path: Path, shard: Shard, index: Index) -> NDArray[np.unsignedinteger]:
    """Memory-mapped tokens ``[sequences, sequence_length]`` of a shard whose hash and token range were checked."""
    raw = _check(path, shard)
    tokens = raw.view(DTYPES[index.dtype]).reshape(shard.sequences, index.sequence_length)
    largest = int(tokens.max())
    if largest >= index.vocab_size:  # the hash proves what the author wrote, not that the author was sane
        raise PsycheError(
            f"{path} holds token {largest} in a vocabulary of {index.vocab_size}: the store is wrong as its author "
            "made it; prepare another"
        )
    return tokens


def _check(path: Path, expected: Shard | TokenizerFile) -> NDArray[np.uint8]:
    """The bytes of a file, memory-mapped, if they are the expected ones."""
    mend = "delete it and run `psyche data prepare` again"
    try:
        raw = np.memmap(path, dtype=np.uint8, mode="r")
    except FileNotFoundError:
        raise PsycheError(f"{path} is missing from the token store: run `psyche data prepare` again") from None
    except ValueError:  # what mmap says of an empty file
        raise PsycheError(f"{path} is empty, expected {expected.bytes} bytes: {mend}") from None
    except OSError as error:
        raise PsycheError(f"cannot read {path} ({error.strerror}): check the disk, or {mend}") from error
    found = blob_root(raw.data).hex()
    if found != expected.root:
        raise PsycheError(f"{path} is corrupt (expected hash {expected.root}, found {found}): {mend}")
    return raw
