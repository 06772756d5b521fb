"""Files that are whole or absent, directories that are closed, and disk errors that a person can act on."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from typing_extensions import Buffer

from psyche.errors import PsycheError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_durably(path: Path, content: Buffer) -> None:
    """Replace ``path`` in one step: after a crash or power loss it holds the old content or the new, never a mix."""
    with durable_file(path) as file:
        file.write(content)


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """The same for content that comes piece by piece: a file that takes the place of ``path`` at the block's end.

    ``path`` stays as it was where the block raises.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def write_at(descriptor: int, content: bytes, offset: int) -> None:
    """All of ``content`` into an open file. A disk that fills up takes a part, and raises for the rest."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def sync_directory(path: Path) -> None:
    """Flush a directory: a new name in it is on disk only then."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def close_to_others(directory: Path) -> None:
    """Have ``directory``, made where it is missing, and nobody but this user able to look into it.

    Raises ``OSError`` where it is another user's, and :class:`PsycheError` where its file system knows no users.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory.chmod(0o700)  # it may have been there, open
    if directory.stat().st_mode & 0o077:
        raise PsycheError(
            f"others on this machine can read {directory}, and its file system cannot keep them out: choose another "
            "place with --directory"
        )


@contextmanager
def disk_errors(path: Path, setting: str = "node.cache") -> Iterator[None]:
    """Turn an :class:`OSError` while writing below ``path`` into a :class:`PsycheError` naming disk and mend.

    ``setting`` is what says where ``path`` is.
    """
    try:
        yield
    except OSError as error:
        mend = f"choose another place with {setting}"
        if error.errno not in FULL:
            raise PsycheError(f"cannot write {error.filename or path} ({error.strerror or error}): {mend}") from error
        disk = _mount(path)
        free = shutil.disk_usage(disk).free / 2**20
        raise PsycheError(
            f"no space left for {path} on the disk mounted at {disk} ({error.strerror}; {free:.0f} MiB free): free "
            f"some and run the command again, it goes on where it stopped, or {mend}"
        ) from error


def _mount(path: Path) -> Path:
    """Mount point of the disk that holds ``path``, which need not exist yet."""
    path = path.absolute()
    while not os.path.ismount(path):
        path = path.parent
    return path
