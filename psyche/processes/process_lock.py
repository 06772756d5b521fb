"""Which process is the node of a directory. The kernel answers, by a lock, so that no foreign one is ever signalled."""

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
"""Locked as long as a node runs in this directory. POSIX's locks name their holder, which flock's do not."""
_FLOCK = "hhqqi0q"
"""struct flock on 64-bit Linux: type, whence, start, length, pid."""

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def registered(directory: Path) -> AsyncIterator[None]:
    """Within, this process is the node of ``directory``, for :func:`process_of` to find. Raises ``PsycheError``."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise PsycheError(
            f"cannot write {directory / LOCK} ({error.strerror}): choose another --directory, or mend its permissions"
        ) from None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system without locks: `psyche leave` will not find it, Ctrl-C still works
        log.debug("%s cannot be locked: %s", directory / LOCK, error)
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def process_of(directory: Path) -> Iterator[Running]:
    """The node that runs in ``directory``. Raises :class:`PsycheError` with the mend where there is none to ask."""
    pid = _holder(directory)
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        raise PsycheError(_nobody(directory)) from None
    try:
        # It may have ended between the two calls, and its number be another's: who holds the lock now is no other.
        if _holder(directory) != pid:
            raise PsycheError(_nobody(directory))
        yield Running(directory, pid, descriptor)
    finally:
        os.close(descriptor)


class Running:
    """A node's process, held by a descriptor that never means another one."""

    def __init__(self, directory: Path, pid: int, descriptor: int) -> None:
        self.directory, self.pid, self.descriptor = directory, pid, descriptor

    def send(self, number: signal.Signals) -> None:
        """Signal it. Raises :class:`PsycheError` where it is gone or another user's."""
        try:
            signal.pidfd_send_signal(self.descriptor, number)
        except ProcessLookupError:
            raise PsycheError(_nobody(self.directory)) from None
        except PermissionError:
            owner = _owner(Path(f"/proc/{self.pid}"))
            raise PsycheError(
                f"the node in {self.directory} (process {self.pid}) is run by the user {owner}: run this command as "
                f"{owner}"
            ) from None


def _holder(directory: Path) -> int:
    """The process that holds the lock of ``directory``. Raises :class:`PsycheError`."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY)
    except PermissionError:
        owner = _owner(directory)
        raise PsycheError(f"{directory} belongs to the user {owner}: run this command as {owner}") from None
    except OSError:
        raise PsycheError(_nobody(directory)) from None
    try:
        wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, wanted))
    except OSError as error:
        raise PsycheError(
            f"the file system of {directory} has no locks ({error.strerror}), so the node in it cannot be found: end "
            "it with Ctrl-C where it runs"
        ) from None
    finally:
        os.close(descriptor)
    if kind == fcntl.F_UNLCK:
        raise PsycheError(_nobody(directory))
    if pid <= 0:
        raise PsycheError(f"the node in {directory} runs in another container or machine: run this command there")
    return int(pid)


def _nobody(directory: Path) -> str:
    if in_use(directory / IDENTITY):
        return (
            f"what runs in {directory} is no node that has joined: a coordinator or a standby, or a node that has just "
            "been started; Ctrl-C ends it where it runs"
        )
    return f"no node runs in {directory}: it has left already, or give the --directory it was joined with"


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (OSError, KeyError):
        return "that started it"
