"""Mirrors: copies of a token store behind fsspec URLs, read as bounded streams and verified by hash."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import mmap
import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from psyche.data.index import Shard, TokenizerFile
from psyche.durable import write_at
from psyche.errors import PsycheError
from psyche.numerics.digest import blob_root

STALL_SECONDS = 30.0
"""A mirror that sends less than :data:`PIECE` bytes in this time is given up."""
PIECE = 1 << 20
THROTTLED = 1 << 16
"""Bytes taken from the download limit at once."""
_ANONYMOUS: dict[str, dict[str, Any]] = {"s3": {"anon": True}, "gs": {"token": "anon"}, "hf": {"token": False}}


class MirrorError(PsycheError):
    """A mirror did not provide a file."""


class MissingFile(MirrorError):
    """The mirror does not have this file; it may have others."""


class WrongBytes(MirrorError):
    """The mirror sent bytes with the wrong hash or length."""


class Mirror:
    """A directory with the files of a token store, behind a URL of any scheme that fsspec supports."""

    def __init__(self, url: str, *, anonymous: bool, stall: float = STALL_SECONDS) -> None:
        """``anonymous``: do not use this machine's credentials (for mirrors named by the run, not by the owner)."""
        self.url = url.rstrip("/")
        self._anonymous, self._stall = anonymous, stall

    async def copy(
        self,
        wanted: Shard | TokenizerFile,
        name: str,
        into: int,
        *,
        progress: Callable[[int], None] = lambda received: None,
        throttle: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Write file ``name``, which must be ``wanted``, to the start of the open file ``into``.

        ``progress`` is called, on a separate thread, with the bytes received so far. ``throttle`` blocks there until
        that many more bytes (at most THROTTLED) may be received; that time does not count as stalled.
        Raises :class:`MirrorError`: :class:`MissingFile`, :class:`WrongBytes`, and others.
        """
        url = f"{self.url}/{name}"
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def finished() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and so has the caller
                loop.call_soon_threadsafe(ended.set)

        transfer = _Transfer(lambda: self._open(url, wanted.bytes), wanted.bytes, into, progress, throttle, finished)
        # Not a pool's thread: fsspec's libraries cannot be interrupted, and a pool would wait for them at exit.
        threading.Thread(target=transfer.run, name="mirror", daemon=True).start()
        try:
            while not ended.is_set():
                before, held = transfer.received // PIECE, transfer.held
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), self._stall)
                waited_for_us = transfer.held - held > self._stall / 2
                if not ended.is_set() and transfer.received // PIECE == before and not waited_for_us:
                    raise MirrorError(f"{url} stalled after {transfer.received:,} bytes")
        finally:
            transfer.abandon()
        if isinstance(transfer.error, FileNotFoundError):
            raise MissingFile(f"{url} does not exist") from transfer.error
        if transfer.error is not None:
            reason = " ".join(str(transfer.error).split())[:200] or type(transfer.error).__name__
            raise MirrorError(f"{url}: {reason}") from transfer.error
        if transfer.received != wanted.bytes or await asyncio.to_thread(_root, into, wanted.bytes) != wanted.root:
            raise WrongBytes(f"{url} has the wrong content ({transfer.received:,} bytes, {wanted.bytes:,} expected)")

    def _open(self, url: str, size: int) -> Any:
        """Open a file for reading from start to end."""
        import fsspec  # slow to import, and most nodes need no mirror

        scheme = url.partition("://")[0]
        if self._anonymous:
            _check_public(url, scheme)
        options = _ANONYMOUS.get(scheme, {}) if self._anonymous else {}
        how: dict[str, Any] = {"block_size": 8 * PIECE, "cache_type": "readahead"}  # for schemes that request ranges
        if scheme in ("http", "https"):
            from aiohttp import ClientTimeout

            # One stream, uncompressed: fsspec reads all that a server sends for a range, and packed data may be a bomb.
            timeout = ClientTimeout(total=None, sock_connect=self._stall, sock_read=self._stall)
            options = {"client_kwargs": {"timeout": timeout, "auto_decompress": False}}
            how = {"block_size": 0, "size": size, "headers": {"Accept-Encoding": "identity"}}
            if self._anonymous:  # a redirect could lead to where _check_public does not allow
                how["allow_redirects"] = False
        elif scheme == "hf":
            how = {"block_size": 0}
        return fsspec.filesystem(scheme, **options).open(url, "rb", **how)


def _check_public(url: str, scheme: str) -> None:
    """Raise :class:`MirrorError` unless a mirror that the run names is on the public internet.

    The author of a run is a stranger: without this its manifest could read files and services of every volunteer's
    machine and home network.
    """
    if scheme in ("s3", "gs", "hf"):
        return
    if scheme not in ("http", "https"):
        raise MirrorError(f"{url}: mirrors named by a run are reached by http, https, s3, gs or hf only")
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or scheme
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise MirrorError(f"{url}: its host is not known ({error.strerror})") from None
    private = sorted(str(one) for one in found if not ipaddress.ip_address(str(one).partition("%")[0]).is_global)
    if private:
        raise MirrorError(
            f"{url} is at {private[0]}, which is not a public address: to use this mirror, name it in node.data_mirrors"
        )


class _Transfer:
    """One transfer, on a thread that can be abandoned."""

    def __init__(
        self,
        source: Callable[[], Any],
        size: int,
        into: int,
        progress: Callable[[int], None],
        throttle: Callable[[int], None],
        finished: Callable[[], None],
    ) -> None:
        self._source, self._size, self._into = source, size, into
        self._progress, self._throttle, self._finished = progress, throttle, finished
        self._lock = threading.Lock()
        self._abandoned = False
        self.received = 0
        self.held = 0.0
        """Seconds spent in ``throttle``."""
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with self._source() as file:
                # One byte more than expected reveals a longer file.
                while left := self._size + 1 - self.received:
                    piece = file.read(min(left, PIECE))
                    if not piece or not self._take(piece[:left]):
                        break
                    self._hold(len(piece))
        except Exception as error:  # each of fsspec's libraries raises its own types
            self.error = error
        self._finished()

    def abandon(self) -> None:
        """Write nothing from now on: the file may belong to another transfer."""
        with self._lock:
            self._abandoned = True

    def _hold(self, count: int) -> None:
        for done in range(0, count, THROTTLED):
            began = time.monotonic()
            self._throttle(min(THROTTLED, count - done))
            self.held += time.monotonic() - began

    def _take(self, piece: bytes) -> bool:
        with self._lock:
            if self._abandoned:
                return False
            write_at(self._into, piece[: max(0, self._size - self.received)], self.received)
            self.received += len(piece)
        self._progress(self.received)
        return True


def _root(descriptor: int, size: int) -> str:
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as content:
        return blob_root(content).hex()
