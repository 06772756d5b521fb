"""Durable files (complete or absent), private directories, and disk errors with the setting that fixes them."""

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
    """Replace ``path`` atomically: after a crash or power loss it holds the old content or the new one."""
    with durable_file(path) as file:
        file.write(content)


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that atomically replaces ``path`` at the end of the block; if the block raises, nothing changes."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def write_at(descriptor: int, content: bytes, offset: int) -> None:
    """Write all of ``content`` at ``offset``, repeating partial writes. Raises ``OSError``."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def sync_directory(path: Path) -> None:
    """Flush a directory: until then a new file name in it may be lost."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def make_private_directory(directory: Path) -> None:
    """Create ``directory`` if it is missing, and make it accessible to this user only.

    Raises ``OSError`` if it belongs to another user, :class:`PsycheError` if its file system has no permissions.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory.chmod(0o700)  # it may exist with wider permissions
    if directory.stat().st_mode & 0o077:
        raise PsycheError(
            f"other users can read {directory}, and its file system does not support permissions: choose another "
            "directory with --directory"
        )


@contextmanager
def disk_errors(path: Path, setting: str = "node.cache") -> Iterator[None]:
    """Turn an :class:`OSError` while writing below ``path`` into a :class:`PsycheError` that says how to fix it.

    ``setting`` is the option that determines ``path``.
    """
    try:
        yield
    except OSError as error:
        fix = f"choose another directory with {setting}"
        if error.errno not in FULL:
            raise PsycheError(f"cannot write {error.filename or path} ({error.strerror or error}): {fix}") from error
        disk = _mount(path)
        free = shutil.disk_usage(disk).free / 2**20
        raise PsycheError(
            f"no space left for {path} on the disk mounted at {disk} ({error.strerror}; {free:.0f} MiB free): free "
            f"disk space and run the command again to resume, or {fix}"
        ) from error


def _mount(path: Path) -> Path:
    """Mount point of the disk that holds ``path``, which need not exist yet."""
    path = path.absolute()
    while not os.path.ismount(path):
        path = path.parent
    return path
