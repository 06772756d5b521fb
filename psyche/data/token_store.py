"""Reading a token store: any sequence by its index, in constant time, from verified bytes only."""

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
from psyche.data.sources import absolute, local_references
from psyche.errors import PsycheError
from psyche.numerics.digest import blob_root, digest
from psyche.protocol.assignment import ShardLayout

INDEX = "index.json"
TOKENIZER = "tokenizer"


def store_path(cache: Path, data: Data) -> Path:
    """Return the directory of a recipe's store on this machine: ``cache/data/<16 hex digits of the recipe's hash>``.

    The same recipe can mean different bytes on different machines, so the hash includes what the source refers to on
    this one (the interpreter's version, the absolute path behind a relative one).
    """
    references = local_references(data.source)
    if isinstance(data.tokenizer, NamedTokenizer):
        references.append(absolute(data.tokenizer.name))
    words = data.model_dump(mode="json", exclude={"mirrors"})  # mirrors do not change the content
    recipe = msgspec.msgpack.encode([FORMAT, words, references], order="sorted")
    return cache.expanduser() / "data" / digest("store recipe", recipe).hex()[:16]


ShardLocation = Callable[[Shard], Path]
"""Maps a shard to the path at which a copy of it may be."""


class BadShard(PsycheError):
    """No good copy of a shard is on this machine. ``corrupt`` lists the corrupt copies that were found."""

    def __init__(self, text: str, corrupt: tuple[Path, ...]) -> None:
        super().__init__(text)
        self.corrupt = corrupt


class Split:
    """The sequences of one split, numbered from 0. Some of its shards may be missing from this machine."""

    def __init__(self, index: Index, shards: tuple[Shard, ...], locations: Sequence[ShardLocation]) -> None:
        self.shards = shards
        self.layout = ShardLayout(sum(shard.sequences for shard in shards), shards[0].sequences if shards else 1)
        self._index = index
        self._locations = locations
        self._opened: dict[int, NDArray[np.unsignedinteger]] = {}

    def __len__(self) -> int:
        """Sequences in the split."""
        return self.layout.sequences

    def batch(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """Sequences ``indices``, in the order given: int64 ``[len(indices), sequence_length]``.

        A shard is opened at its first use. Raises :class:`BadShard` for one that is missing or corrupt, and
        :class:`IndexError` for an index outside the split.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"sequences {wanted.min()}..{wanted.max()} asked of a split of {len(self)}")
        out = np.empty((len(wanted), self._index.sequence_length), dtype=np.int64)
        shard_of, places = np.divmod(wanted, self.layout.per_shard)
        if wanted.size and (shard_of == shard_of[0]).all():  # the usual case: neighbours share a shard
            out[:] = self.open(int(shard_of[0])).take(places, axis=0)
            return out
        for row, number, place in zip(out, shard_of.tolist(), places.tolist(), strict=True):
            row[:] = self.open(number)[place]
        return out

    def open(self, number: int) -> NDArray[np.unsignedinteger]:
        """Tokens ``[sequences, sequence_length]`` of a shard, memory-mapped. Hashed now, unless it is open already.

        Uses the first good copy, which is not evicted (``data/cache.py``) while it is open. Raises
        :class:`BadShard` if there is none.
        """
        opened = self._opened.get(number)
        if opened is None:  # two threads may both check it, which is harmless
            opened = self._opened[number] = self._open_copy(self.shards[number])
        return opened

    def is_open(self, number: int) -> bool:
        """Return whether a shard is open: reading it needs no more checks."""
        return number in self._opened

    def close_all_but(self, numbers: Collection[int]) -> None:
        """Close all other shards; threads that are reading one continue to read."""
        for number in set(self._opened).difference(numbers):
            self._opened.pop(number, None)

    def copies(self, number: int) -> list[Path]:
        """Paths of files with the shard's size, which may be copies of it."""
        shard = self.shards[number]
        return [path for location in self._locations if has_size(path := location(shard), shard.bytes)]

    def _open_copy(self, shard: Shard) -> NDArray[np.unsignedinteger]:
        faults, corrupt = [], []
        for location in self._locations:
            path = location(shard)
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

    def __init__(self, path: Path, index: Index, locations: Sequence[ShardLocation] = ()) -> None:
        """``locations``: where training shards may be, besides ``path``."""
        self.path = path
        self.index = index
        self.root = index.root
        self.sequence_length = index.sequence_length
        self.vocab_size = index.vocab_size
        self.train = Split(index, index.train, (*locations, self.path_of))
        self.heldout = Split(index, index.heldout, (self.path_of,))
        self._tokenizer_checked = False

    def path_of(self, shard: Shard) -> Path:
        """Return the path of a shard in this store's directory."""
        return self.path / shard.file

    @classmethod
    def open(cls, path: Path, root: bytes | None = None, locations: Sequence[ShardLocation] = ()) -> TokenStore:
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
                "prepared from different text (another Python, changed files); copy the run author's store there"
            )
        return cls(path, index, locations)

    @property
    def tokenizer_path(self) -> Path:
        """The directory for ``AutoTokenizer.from_pretrained``. Raises :class:`PsycheError` if it was modified."""
        if not self._tokenizer_checked:
            for item in self.index.tokenizer:
                _check(self.path / TOKENIZER / item.file, item)
            self._tokenizer_checked = True
        return self.path / TOKENIZER

    def verify(self, verified: Callable[[Path], None] = lambda _: None) -> None:
        """Hash every file again and call ``verified`` with each good one. Raises :class:`PsycheError` for a bad one."""
        for item in self.index.tokenizer:
            _check(self.path / TOKENIZER / item.file, item)
            verified(self.path / TOKENIZER / item.file)
        for shard in self.index.train + self.index.heldout:
            _map_checked(self.path / shard.file, shard, self.index)
            verified(self.path / shard.file)

    def complete(self) -> bool:
        """Return whether every file exists with the right size; reads none of them."""
        files = [(self.path / TOKENIZER / item.file, item.bytes) for item in self.index.tokenizer]
        files += [(self.path / shard.file, shard.bytes) for shard in self.index.train + self.index.heldout]
        return all(has_size(file, size) for file, size in files)


class _Corrupt(PsycheError):
    """A file does not match its hash."""


class _Missing(PsycheError):
    """A file cannot be read."""


def has_size(path: Path, size: int) -> bool:
    """Return whether a file exists and has this size."""
    return path.is_file() and path.stat().st_size == size


def _map_checked(path: Path, shard: Shard, index: Index) -> NDArray[np.unsignedinteger]:
    """Memory-mapped tokens ``[sequences, sequence_length]`` of a shard whose hash and token range were checked."""
    raw = _check(path, shard)
    tokens = raw.view(DTYPES[index.dtype]).reshape(shard.sequences, index.sequence_length)
    largest = int(tokens.max())
    if largest >= index.vocab_size:  # the hash only proves what the author wrote
        raise PsycheError(
            f"{path} holds token {largest} in a vocabulary of {index.vocab_size}: the store is invalid as its "
            "author published it; prepare another"
        )
    return tokens


def _check(path: Path, expected: Shard | TokenizerFile) -> NDArray[np.uint8]:
    """Memory-map a file whose hash is the expected one. The file is locked as in use while it is mapped."""
    fix = "delete it and run `psyche data prepare` again"
    try:
        with path.open("rb") as file:
            with contextlib.suppress(OSError):  # not every file system has locks
                # flock's lock is the open file's: the mapping holds a duplicate of the descriptor, and so the lock.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            raw = np.memmap(file, dtype=np.uint8, mode="r")
    except FileNotFoundError:
        raise _Missing(f"{path} is missing from the token store: run `psyche data prepare` again") from None
    except ValueError:  # mmap raises it for an empty file
        raise _Corrupt(f"{path} is empty, expected {expected.bytes} bytes: {fix}") from None
    except OSError as error:
        raise _Missing(f"cannot read {path} ({error.strerror}): check the disk, or {fix}") from error
    found = blob_root(raw.data).hex()
    if found != expected.root:
        raise _Corrupt(f"{path} is corrupt (expected hash {expected.root}, found {found}): {fix}")
    return raw
