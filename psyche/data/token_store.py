"""Read a token store: any sequence by its index, in constant time, never a byte that was not checked."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from psyche.config import Data, NamedTokenizer
from psyche.data.index import DTYPES, FORMAT, MAX_INDEX_BYTES, Index, Shard, TokenizerFile, decode_index
from psyche.data.sources import absolute, meant_here
from psyche.errors import PsycheError
from psyche.numerics.digest import blob_root, digest
from psyche.protocol.assignment import ShardLayout

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
    words = data.model_dump(mode="json", exclude={"mirrors"})  # where it can be had does not change what it is
    recipe = msgspec.msgpack.encode([FORMAT, words, meant], order="sorted")
    return cache.expanduser() / "data" / digest("store recipe", recipe).hex()[:16]


Place = Callable[[Shard], Path]
"""Where a copy of a shard would be."""


class BadShard(PsycheError):
    """No good copy of a shard is on this machine. ``corrupt`` are the bad ones that were found."""

    def __init__(self, text: str, corrupt: tuple[Path, ...]) -> None:
        super().__init__(text)
        self.corrupt = corrupt


class Split:
    """The sequences of one split, numbered from 0. Not all of its shards need be here."""

    def __init__(self, index: Index, shards: tuple[Shard, ...], places: Sequence[Place]) -> None:
        self.shards = shards
        self.shape = ShardLayout(sum(shard.sequences for shard in shards), shards[0].sequences if shards else 1)
        self._index = index
        self._places = places
        self._opened: dict[int, NDArray[np.unsignedinteger]] = {}

    def __len__(self) -> int:
        """Sequences in the split."""
        return self.shape.sequences

    def batch(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """Sequences ``indices``, in the order given: int64 ``[len(indices), sequence_length]``.

        A shard is opened at its first use. Raises :class:`BadShard` for one that is missing or corrupt, and
        :class:`IndexError` for an index outside the split.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"sequences {wanted.min()}..{wanted.max()} asked of a split of {len(self)}")
        out = np.empty((len(wanted), self._index.sequence_length), dtype=np.int64)
        shard_of, places = np.divmod(wanted, self.shape.per_shard)
        if wanted.size and (shard_of == shard_of[0]).all():  # as nearly always: neighbours are of one shard
            out[:] = self.open(int(shard_of[0])).take(places, axis=0)
            return out
        for row, number, place in zip(out, shard_of.tolist(), places.tolist(), strict=True):
            row[:] = self.open(number)[place]
        return out

    def open(self, number: int) -> NDArray[np.unsignedinteger]:
        """Tokens ``[sequences, sequence_length]`` of a shard, memory-mapped. Hashed now, unless it is open already.

        The first good copy counts. Nobody evicts it (``data/cache.py``) as long as it is open. Raises
        :class:`BadShard` where there is none.
        """
        opened = self._opened.get(number)
        if opened is None:  # two threads may both check it: wasteful once, never wrong
            opened = self._opened[number] = self._check_places(self.shards[number])
        return opened

    def is_open(self, number: int) -> bool:
        """Whether reading it needs no more checks."""
        return number in self._opened

    def close_all_but(self, numbers: Collection[int]) -> None:
        """Let go of all other shards; who reads one meanwhile goes on reading."""
        for number in set(self._opened).difference(numbers):
            self._opened.pop(number, None)

    def copies(self, number: int) -> list[Path]:
        """Files that have the size of a shard and may be it."""
        shard = self.shards[number]
        return [path for place in self._places if is_of_size(path := place(shard), shard.bytes)]

    def _check_places(self, shard: Shard) -> NDArray[np.unsignedinteger]:
        faults, corrupt = [], []
        for place in self._places:
            path = place(shard)
            try:
                return _map_checked(path, shard, self._index)
            except _Corrupt as error:
                faults.append(str(error))
                corrupt.append(path)
            except _Missing as error:
                faults.append(str(error))
        raise BadShard("; ".join(faults), tuple(corrupt))


class TokenStore:
    """A finished store. ``train`` and ``heldout`` are its splits; no document is in both."""

    def __init__(self, path: Path, index: Index, places: Sequence[Place] = ()) -> None:
        """``places`` are where training shards may be, besides ``path``."""
        self.path = path
        self.index = index
        self.root = index.root
        self.sequence_length = index.sequence_length
        self.vocab_size = index.vocab_size
        self.train = Split(index, index.train, (*places, self.place))
        self.heldout = Split(index, index.heldout, (self.place,))
        self._tokenizer_checked = False

    def place(self, shard: Shard) -> Path:
        """Where a shard is in a store that holds all of them."""
        return self.path / shard.file

    @classmethod
    def open(cls, path: Path, root: bytes | None = None, places: Sequence[Place] = ()) -> TokenStore:
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
        return cls(path, index, places)

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
        return all(is_of_size(file, size) for file, size in files)


class _Corrupt(PsycheError):
    """A file is not what it should be."""


class _Missing(PsycheError):
    """A file cannot be read."""


def is_of_size(path: Path, size: int) -> bool:
    """Whether a file is there, and so long."""
    return path.is_file() and path.stat().st_size == size


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
    """The bytes of a file, memory-mapped, if they are the expected ones. It is locked as being in use while mapped."""
    mend = "delete it and run `psyche data prepare` again"
    try:
        with path.open("rb") as file:
            with contextlib.suppress(OSError):  # not every file system has locks
                # flock's lock is the open file's: the mapping holds a duplicate of the descriptor, and so the lock.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            raw = np.memmap(file, dtype=np.uint8, mode="r")
    except FileNotFoundError:
        raise _Missing(f"{path} is missing from the token store: run `psyche data prepare` again") from None
    except ValueError:  # what mmap says of an empty file
        raise _Corrupt(f"{path} is empty, expected {expected.bytes} bytes: {mend}") from None
    except OSError as error:
        raise _Missing(f"cannot read {path} ({error.strerror}): check the disk, or {mend}") from error
    found = blob_root(raw.data).hex()
    if found != expected.root:
        raise _Corrupt(f"{path} is corrupt (expected hash {expected.root}, found {found}): {mend}")
    return raw
