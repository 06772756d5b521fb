"""Content-addressed blobs: served by whoever has them, also while they are still arriving. The other side is fetch.py.

On the wire, after the stream opens, any number of times: frame(root ‖ u8 index wanted ‖ u32 for each chunk wanted)
-> OK, frame(index) if wanted, then for each chunk: OK and its bytes, or ABSENT. A server that does not have the blob
refuses. Requests may be sent ahead of the answers, so that the line is never idle between two of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

from typing_extensions import Buffer

from psyche.network.limits import Limiter
from psyche.network.pipe import Pipe
from psyche.network.spool import Blob
from psyche.network.streams import OK, STALL_SECONDS, Refused, Stream, Streams, Violation
from psyche.numerics.digest import HASH_BYTES, BlobIndex, chunked, index_blob

UPLOADS = 64
"""Streams served at once, a thread and a chunk in memory each. Whoever comes later asks again until its turn."""
ABSENT = 2
"""Status of a chunk that is not here (yet, or any more)."""
MAX_ASKED = 4096
"""Chunks asked for in one request."""
REQUEST_BYTES = HASH_BYTES + 1 + 4 * MAX_ASKED
NAME = "blob"

Read = Callable[[int], Buffer]
"""Number of a chunk -> its bytes. Runs on a worker thread; may raise OSError or LookupError when they are gone."""


@dataclass(eq=False)
class _Entry:
    load: Callable[[], BlobIndex]
    read: Read
    live: bool

    @cached_property
    def index(self) -> BlobIndex:
        return self.load()


@dataclass(frozen=True)
class Request:
    """What a caller wants of a blob."""

    root: bytes
    index: bool
    chunks: tuple[int, ...]

    def encode(self) -> bytes:
        return self.root + bytes([self.index]) + struct.pack(f"<{len(self.chunks)}I", *self.chunks)

    @classmethod
    def decode(cls, data: bytes) -> Request:
        """Raises :class:`Violation`."""
        numbers, rest = divmod(len(data) - HASH_BYTES - 1, 4)
        if numbers < 0 or rest or data[HASH_BYTES] > 1:
            raise Violation("not a request for a blob")
        chunks = struct.unpack_from(f"<{numbers}I", data, HASH_BYTES + 1)
        return cls(data[:HASH_BYTES], bool(data[HASH_BYTES]), chunks)


class BlobServer:
    """What this node has to give. What was added twice is served until it was removed twice."""

    def __init__(self, streams: Streams, limiter: Limiter) -> None:
        self._streams, self._limiter = streams, limiter
        self._entries: dict[bytes, list[_Entry]] = {}
        self._threads = ThreadPoolExecutor(UPLOADS, "upload")

    async def start(self) -> None:
        """Answer callers from now on."""
        await self._streams.serve(NAME, self._serve, at_once=UPLOADS)

    def close(self) -> None:
        """After the streams were closed."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def add(self, index: BlobIndex, read: Read) -> None:
        """Serve a blob whose chunks ``read`` gives on demand.

        What ``read`` gives is checked before it is sent, so it may be live state: once that has moved on, callers
        hear that the chunk is not here.
        """
        self._put(index.root, _Entry(lambda: index, read, live=True))

    def add_unread(self, root: bytes, load: Callable[[], BlobIndex], read: Read) -> None:
        """The same for a blob that nobody has hashed yet: ``load`` does, on a worker thread, when it is asked for.

        ``load`` raises what ``read`` may where it is not here, or is another blob than ``root``.
        """
        self._put(root, _Entry(load, read, live=True))

    def add_blob(self, blob: Blob) -> None:
        """Serve a blob of the spool; chunks that arrive later, too, from then on."""
        self._put(blob.index.root, _Entry(lambda: blob.index, blob.__getitem__, live=False))

    def add_bytes(self, data: bytes) -> bytes:
        """Serve a byte string, hashed here (so call it on a worker thread when it is large). Returns its root."""
        index, pieces = index_blob(data), list(chunked(data))
        self._put(index.root, _Entry(lambda: index, pieces.__getitem__, live=False))
        return index.root

    def remove(self, root: bytes, read: Read | None = None) -> None:
        """Take back the oldest :meth:`add` of a blob (with ``read``, if given), if there is one.

        After the last, it is served no more, also amid a transfer.
        """
        entries = self._entries.get(root, [])
        for number, entry in enumerate(entries):
            if read is None or entry.read == read:
                del entries[number]
                break
        if not entries:
            self._entries.pop(root, None)

    def remove_blob(self, blob: Blob) -> None:
        """Take back :meth:`add_blob`."""
        self.remove(blob.index.root, blob.__getitem__)

    def _put(self, root: bytes, entry: _Entry) -> None:
        self._entries.setdefault(root, []).append(entry)

    async def _serve(self, stream: Stream) -> None:
        """Answer one request after the other, until the caller hangs up."""
        pipe = Pipe.of_descriptor(stream.peer_id, stream.descriptor, self._streams.traffic, self._limiter)
        loop = asyncio.get_running_loop()
        try:
            request = Request.decode(await stream.read_request(REQUEST_BYTES))
            while True:
                if request.root not in self._entries:
                    raise Refused("does not have it")
                answering = loop.run_in_executor(self._threads, self._answer, pipe, request)
                try:
                    await asyncio.shield(answering)
                except asyncio.CancelledError:
                    pipe.interrupt()  # the thread may be waiting for the caller to read
                    await asyncio.wait([answering])
                    raise
                frame = await stream.next_request(REQUEST_BYTES)
                if frame is None:
                    return
                request = Request.decode(frame)
        finally:
            pipe.close()

    def _answer(self, pipe: Pipe, request: Request) -> None:
        """Send what was asked for. Runs on a thread."""
        index = self._index(request.root)
        if any(number >= index.chunks for number in request.chunks):
            raise Refused("there are no such chunks")
        head = bytes([OK])
        if request.index:
            encoded = index.encode()
            head += len(encoded).to_bytes(4, "big") + encoded
        pipe.send(memoryview(head), STALL_SECONDS)
        started, sent = time.monotonic(), 0
        for number in request.chunks:
            chunk = self._chunk(request.root, number)
            if chunk is None:
                pipe.send(memoryview(bytes([ABSENT])), STALL_SECONDS)
                continue
            pipe.send(memoryview(bytes([OK])), STALL_SECONDS)
            pipe.send(memoryview(chunk), STALL_SECONDS)
            sent += len(chunk)
        seconds = time.monotonic() - started
        self._streams.traffic.measured(pipe.peer_id, down=False, count=sent, seconds=seconds)

    def _index(self, root: bytes) -> BlobIndex:
        """Raises :class:`Refused`."""
        for entry in reversed(self._entries.get(root, [])):
            with contextlib.suppress(OSError, LookupError):
                return entry.index
        raise Refused("does not have it")

    def _chunk(self, root: bytes, number: int) -> bytes | None:
        """A copy of one chunk (the original may change while it is sent), or None if it is not what it was."""
        for entry in reversed(self._entries.get(root, [])):
            try:
                chunk = bytes(entry.read(number))
                if not entry.live or entry.index.matches(number, chunk):
                    return chunk
            except (OSError, LookupError):
                continue
        return None
