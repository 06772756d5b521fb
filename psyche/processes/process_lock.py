"""Find the process of the node in a directory by a file lock, so that no other process is ever signalled."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from psyche.errors import PsycheError
from psyche.network.identity import IDENTITY, in_use

LOCK = "node.lock"
"""Locked while a node runs in this directory. POSIX record locks name their holder; flock() locks do not."""
_FLOCK = "hhqqi0q"
"""``struct flock`` on 64-bit Linux: type, whence, start, length, pid."""

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def registered(directory: Path) -> AsyncIterator[None]:
    """Register this process as the node of ``directory`` while the block runs. Raises ``PsycheError``."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise PsycheError(
            f"cannot write {directory / LOCK} ({error.strerror}): choose another --directory, or fix its permissions"
        ) from None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # no locks on this file system: only `psyche leave` needs them
        log.debug("%s cannot be locked: %s", directory / LOCK, error)
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def process_of(directory: Path) -> Iterator[NodeProcess]:
    """Open the process of the node in ``directory``. Raises :class:`PsycheError` if no node runs there."""
    pid = _holder(directory)
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        raise PsycheError(_no_node(directory)) from None
    try:
        # The pid may have been reused between the two calls; the lock says whether it still is the node.
        if _holder(directory) != pid:
            raise PsycheError(_no_node(directory))
        yield NodeProcess(directory, pid, descriptor)
    finally:
        os.close(descriptor)


class NodeProcess:
    """A node's process, held by a pidfd so that a reused pid cannot be mistaken for it."""

    def __init__(self, directory: Path, pid: int, descriptor: int) -> None:
        self.directory, self.pid, self.descriptor = directory, pid, descriptor

    def send(self, number: signal.Signals) -> None:
        """Send a signal. Raises :class:`PsycheError` if the process is gone or belongs to another user."""
        try:
            signal.pidfd_send_signal(self.descriptor, number)
        except ProcessLookupError:
            raise PsycheError(_no_node(self.directory)) from None
        except PermissionError:
            owner = _owner(Path(f"/proc/{self.pid}"))
            raise PsycheError(
                f"the node in {self.directory} (process {self.pid}) belongs to user {owner}: run this command as "
                f"{owner}"
            ) from None


def _holder(directory: Path) -> int:
    """Return the pid that holds the lock of ``directory``. Raises :class:`PsycheError`."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY)
    except PermissionError:
        owner = _owner(directory)
        raise PsycheError(f"{directory} belongs to user {owner}: run this command as {owner}") from None
    except OSError:
        raise PsycheError(_no_node(directory)) from None
    try:
        wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, wanted))
    except OSError as error:
        raise PsycheError(
            f"the file system of {directory} does not support locks ({error.strerror}), so its node cannot be found: "
            "press Ctrl-C in the terminal where it runs"
        ) from None
    finally:
        os.close(descriptor)
    if kind == fcntl.F_UNLCK:
        raise PsycheError(_no_node(directory))
    if pid <= 0:
        raise PsycheError(f"the node in {directory} runs in another container or machine: run this command there")
    return int(pid)


def _no_node(directory: Path) -> str:
    if in_use(directory / IDENTITY):
        return (
            f"the process in {directory} is a coordinator, a standby, or a node that has not joined yet: press Ctrl-C "
            "in the terminal where it runs"
        )
    return f"no node runs in {directory}: it has left, or it was joined with another --directory"


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (OSError, KeyError):
        return "unknown"
