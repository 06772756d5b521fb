"""The shard cache: a bounded directory of fetched shards, named by their roots, shared by all local processes.

File locks coordinate the processes. A process that maps a shard (``token_store.py``) holds a shared lock, so the shard
is not evicted; a process that fetches one holds an exclusive lock, and others that want it wait. A process's locks end
with it, so a crash leaves at most a partial file, which is taken over or evicted.

Where a file system does not support locks, each process fetches into a partial file of its own: two processes may fetch
the same shard, and one may delete a shard that another has open (which can still read it).
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
"""Suffix of a shard that is being fetched."""
ABANDONED_SECONDS = 3600.0
"""Age at which a partial file counts as abandoned where no lock tells whether its process is alive."""


class CacheFull(PsycheError):
    """All shards in the cache are in use."""


class ShardCache:
    """At most ``limit`` bytes of shards in ``directory``."""

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit
        self.locks = True
        """Whether the file system supports locks; known after the first fetch."""

    def path_of(self, shard: Shard) -> Path:
        """Return the path of a shard, cached or not."""
        return self.directory / shard.root

    def room(self) -> int:
        """Return bytes that can be added without an eviction."""
        return max(0, self.limit - sum(size for _, size, _ in self._found()))

    def used(self, shard: Shard) -> None:
        """Mark a shard as recently used: it is evicted late."""
        with contextlib.suppress(OSError):
            os.utime(self.path_of(shard))

    def drop(self, shard: Shard) -> None:
        """Delete a corrupt copy."""
        self.path_of(shard).unlink(missing_ok=True)

    def claim(self, shard: Shard) -> Incoming | None:
        """Create the file to fetch a shard into, with its space allocated; None while another process fetches it.

        Raises :class:`CacheFull`, and ``OSError`` where the disk does not allow it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        incoming = Incoming.begin(self.path_of(shard))
        if incoming is None:
            return None
        self.locks = incoming.locked
        try:
            with self._alone():
                self._make_room(shard.bytes)
                os.posix_fallocate(incoming.descriptor, 0, shard.bytes)  # fails now if the disk is full
        except BaseException:
            incoming.close()
            raise
        return incoming

    def _make_room(self, size: int) -> None:
        """Evict the least recently used files until ``size`` more bytes fit the limit."""
        found = self._found()
        used = sum(taken for _, taken, _ in found)
        for _, taken, path in sorted(found, key=lambda one: (one[2].suffix != PART, one)):  # unfinished ones first
            if used + size <= self.limit:
                return
            if _evict(path):
                used -= taken
        if used + size > self.limit:
            raise CacheFull(
                f"the shard cache {self.directory} is full of shards in use ({self.limit / 1e9:g} GB): "
                "raise node.data_cache in the node file"
            )

    def _found(self) -> list[tuple[int, int, Path]]:
        """Last use (ns), size and path of each file."""
        found = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self.directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found.append((entry.stat().st_mtime_ns, entry.stat().st_size, Path(entry.path)))
        return found

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Serialise processes that make room: the second counts what the first has taken."""
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # not every file system supports locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class Incoming:
    """A shard being fetched into the cache: a partial file until :meth:`keep` renames it."""

    def __init__(self, path: Path, part: Path, descriptor: int, *, locked: bool) -> None:
        self._path, self._part, self.descriptor, self.locked = path, part, descriptor, locked

    @classmethod
    def begin(cls, path: Path) -> Self | None:
        """Create an empty partial file for ``path``; None if another process has it."""
        part = path.with_name(path.name + PART)
        descriptor = _create(part)
        locked = _lock(descriptor)
        if locked is None:  # another process could open it and overwrite our data
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
        """Rename the complete, verified file to the shard's name. Raises ``OSError``."""
        os.fsync(self.descriptor)
        os.replace(self._part, self._path)
        sync_directory(self._path.parent)

    def close(self) -> None:
        """Delete the partial file unless it was kept."""
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
    """Lock an open file exclusively; False if another process holds a lock, None if locks are not supported."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still at ``path``, not renamed or deleted by the previous lock holder."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _evict(path: Path) -> bool:
    """Delete a file unless it is in use, as far as that is known; return whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # NFS cannot lock a file opened read-only
    except FileNotFoundError:
        return True
    except PermissionError:
        return False  # the file of another user
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
