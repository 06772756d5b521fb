"""Copies of a token store elsewhere, by fsspec URL: read as a stream, bounded, believed by hash alone."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import threading
import time
from collections.abc import Callable
from typing import Any

from psyche.data.index import Shard, TokenizerFile
from psyche.durable import write_at
from psyche.errors import PsycheError
from psyche.numerics.digest import blob_root

STALL_SECONDS = 30.0
"""A mirror that does not send :data:`PIECE` bytes in so long is given up."""
PIECE = 1 << 20
THROTTLED = 1 << 16
"""Bytes that are accounted for at once."""
_ANONYMOUS: dict[str, dict[str, Any]] = {"s3": {"anon": True}, "gs": {"token": "anon"}, "hf": {"token": False}}


class MirrorError(PsycheError):
    """A mirror did not give what was asked of it."""


class NotThere(MirrorError):
    """It does not have this file; it may have others."""


class WrongBytes(MirrorError):
    """It gave something else."""


class Mirror:
    """A directory with the files of a token store, behind a URL of any scheme that fsspec has."""

    def __init__(self, url: str, *, anonymous: bool, stall: float = STALL_SECONDS) -> None:
        """``anonymous``: whoever named the mirror is not to have this machine's credentials used for it."""
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

        ``progress`` hears the bytes received so far, on a thread of its own. ``throttle`` waits there until so many
        more, at most THROTTLED, may come; that is not held against the mirror. Raises :class:`MirrorError`:
        :class:`NotThere`, and :class:`WrongBytes` where the hash is not the one it should be.
        """
        url = f"{self.url}/{name}"
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def finished() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone, and so is whoever waited
                loop.call_soon_threadsafe(ended.set)

        transfer = _Transfer(lambda: self._open(url, wanted.bytes), wanted.bytes, into, progress, throttle, finished)
        # No thread of a pool: what fsspec's many libraries wait for cannot be interrupted, and a pool waits for it.
        threading.Thread(target=transfer.run, name="mirror", daemon=True).start()
        try:
            while not ended.is_set():
                before, held = transfer.received // PIECE, transfer.held
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), self._stall)
                waited_for_us = transfer.held - held > self._stall / 2
                if not ended.is_set() and transfer.received // PIECE == before and not waited_for_us:
                    raise MirrorError(f"{url} has stalled after {transfer.received:,} bytes")
        finally:
            transfer.abandon()
        if isinstance(transfer.error, FileNotFoundError):
            raise NotThere(f"{url} is not there") from transfer.error
        if transfer.error is not None:
            reason = " ".join(str(transfer.error).split())[:200] or type(transfer.error).__name__
            raise MirrorError(f"{url}: {reason}") from transfer.error
        if transfer.received != wanted.bytes or await asyncio.to_thread(_root, into, wanted.bytes) != wanted.root:
            raise WrongBytes(f"{url} is not the run's ({transfer.received:,} bytes, {wanted.bytes:,} expected)")

    def _open(self, url: str, size: int) -> Any:
        """A file to read from start to end."""
        import fsspec  # takes a while, and most nodes need none of it

        scheme = url.partition("://")[0]
        options = _ANONYMOUS.get(scheme, {}) if self._anonymous else {}
        how: dict[str, Any] = {"block_size": 8 * PIECE, "cache_type": "readahead"}  # requests, where each is a range
        if scheme in ("http", "https"):
            from aiohttp import ClientTimeout

            # One stream: for a range fsspec would take all that a server sends, and what a server packs may be a bomb.
            timeout = ClientTimeout(total=None, sock_connect=self._stall, sock_read=self._stall)
            options = {"client_kwargs": {"timeout": timeout, "auto_decompress": False}}
            how = {"block_size": 0, "size": size, "headers": {"Accept-Encoding": "identity"}}
        elif scheme == "hf":
            how = {"block_size": 0}
        return fsspec.filesystem(scheme, **options).open(url, "rb", **how)


class _Transfer:
    """One file on its way, on a thread that can be left behind."""

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
                # One byte more than there should be tells a longer file.
                while left := self._size + 1 - self.received:
                    piece = file.read(min(left, PIECE))
                    if not piece or not self._take(piece[:left]):
                        break
                    self._hold(len(piece))
        except Exception as error:  # each of fsspec's libraries has its own
            self.error = error
        self._finished()

    def abandon(self) -> None:
        """From now on nothing is written: the file belongs to another transfer, or to nobody."""
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
