"""Shards fetched from elsewhere: a directory of files named by their roots, bounded, shared by all processes here.

File locks coordinate processes. An open shard is locked, shared, by the process that maps it (``data/token_store.py``),
and is not evicted. A shard being fetched is locked by the fetcher; other processes that want it wait. Locks end with
their process, so a crash leaves only a partial file, which the next fetch continues or evicts.

On a file system without locks each process fetches into a partial file of its own, which is renamed once complete: two
may fetch the same shard, and one may delete a file that another has open, which can still be read.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from psyche.data.index import Shard
from psyche.durable import sync_directory
from psyche.errors import PsycheError

PART = ".part"
"""Ends the name of a shard that is being fetched."""
ABANDONED_SECONDS = 3600.0
"""Since somebody has written into a part, where no lock says whether its fetcher is alive."""


class CacheFull(PsycheError):
    """All that is in the cache is in use."""


class ShardCache:
    """At most ``limit`` bytes of shards in ``directory``."""

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit
        self.locks = True
        """Whether its file system has locks, as far as is known: what was fetched into it has shown."""

    def place(self, shard: Shard) -> Path:
        """Where a shard is, or would be."""
        return self.directory / shard.root

    def room(self) -> int:
        """Bytes that may be added without anything making way."""
        return max(0, self.limit - sum(size for _, size, _ in self._found()))

    def used(self, shard: Shard) -> None:
        """A shard is needed now: it will be among the last to make way."""
        with contextlib.suppress(OSError):
            os.utime(self.place(shard))

    def drop(self, shard: Shard) -> None:
        """Remove a copy, which is bad."""
        self.place(shard).unlink(missing_ok=True)

    def claim(self, shard: Shard) -> Incoming | None:
        """The file to fetch a shard into, with room made for all of it; None while another process fetches it.

        Raises :class:`CacheFull`, and ``OSError`` where the disk does not allow it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        incoming = Incoming.begin(self.place(shard))
        if incoming is None:
            return None
        self.locks = incoming.locked
        try:
            with self._alone():
                self._make_room(shard.bytes)
                os.posix_fallocate(incoming.descriptor, 0, shard.bytes)  # a full disk is known now, and others count it
        except BaseException:
            incoming.close()
            raise
        return incoming

    def _make_room(self, size: int) -> None:
        """Evict what was used longest ago until ``size`` bytes more are within the limit."""
        found = self._found()
        used = sum(taken for _, taken, _ in found)
        for _, taken, path in sorted(found, key=lambda one: (one[2].suffix != PART, one)):  # unfinished ones first
            if used + size <= self.limit:
                return
            if _evict(path):
                used -= taken
        if used + size > self.limit:
            raise CacheFull(
                f"node.data_cache ({self.limit / 1e9:g} GB) is full of shards that are in use: allow it more, in the "
                "node: file"
            )

    def _found(self) -> list[tuple[int, int, Path]]:
        """When each file was last used, its size, and itself."""
        found = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self.directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found.append((entry.stat().st_mtime_ns, entry.stat().st_size, Path(entry.path)))
        return found

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Of two processes that make room at once, the second counts what the first has taken."""
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class Incoming:
    """A shard's file on its way into the cache: a part, until :meth:`keep` gives it its name."""

    def __init__(self, path: Path, part: Path, descriptor: int, *, locked: bool) -> None:
        self._path, self._part, self.descriptor, self.locked = path, part, descriptor, locked

    @classmethod
    def begin(cls, path: Path) -> Self | None:
        """An empty part for ``path``; None where another process has it."""
        part = path.with_name(path.name + PART)
        descriptor = _create(part)
        locked = _lock(descriptor)
        if locked is None:  # whoever opens it under this name would write over what we write
            os.close(descriptor)
            part.unlink(missing_ok=True)
            part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PART}")
            return cls(path, part, _create(part), locked=False)
        if not locked or not _is_still(descriptor, part):
            os.close(descriptor)
            return None
        os.ftruncate(descriptor, 0)
        return cls(path, part, descriptor, locked=True)

    def keep(self) -> None:
        """What was written is the shard. Raises ``OSError``."""
        os.fsync(self.descriptor)
        os.replace(self._part, self._path)
        sync_directory(self._path.parent)

    def close(self) -> None:
        """Remove the part, if it was not kept."""
        with contextlib.suppress(FileNotFoundError):
            if _is_still(self.descriptor, self._part):
                self._part.unlink()
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _create(part: Path) -> int:
    return os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _lock(descriptor: int) -> bool | None:
    """Lock an open file for this process alone: False where somebody has it, None where it cannot be locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether an open file has not been renamed or removed by whoever had it locked before."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _evict(path: Path) -> bool:
    """Remove a file that nobody uses, as far as can be known."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # NFS locks nothing that is open for reading only
    except FileNotFoundError:
        return True
    except PermissionError:
        return False  # another user's
    try:
        locked = _lock(descriptor)
        if locked is False or (locked is None and path.suffix == PART and not _abandoned(descriptor)):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _abandoned(part: int) -> bool:
    return time.time() - os.fstat(part).st_mtime > ABANDONED_SECONDS
