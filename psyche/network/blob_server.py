"""Serving content-addressed blobs, also while they are still arriving. ``download.py`` is the other side.

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

from psyche.network.bandwidth import Limiter
from psyche.network.pipe import Pipe
from psyche.network.spool import Blob
from psyche.network.streams import OK, Stream, Streams
from psyche.network.transport import STALL_SECONDS, ReadChunk, Refused, Violation
from psyche.numerics.digest import HASH_BYTES, BlobIndex, chunked, index_blob

UPLOADS = 64
"""Streams served at once, with a thread and a chunk in memory each. Further callers are told to try again."""
ABSENT = 2
"""Status of a chunk that this server does not have (yet, or any more)."""
MAX_CHUNKS_PER_REQUEST = 4096
REQUEST_BYTES = HASH_BYTES + 1 + 4 * MAX_CHUNKS_PER_REQUEST
PROTOCOL = "blob"


@dataclass(eq=False)
class _Entry:
    load: Callable[[], BlobIndex]
    read: ReadChunk
    live: bool

    @cached_property
    def index(self) -> BlobIndex:
        return self.load()


@dataclass(frozen=True)
class Request:
    """A request for parts of a blob."""

    root: bytes
    index: bool
    chunks: tuple[int, ...]

    def encode(self) -> bytes:
        return self.root + bytes([self.index]) + struct.pack(f"<{len(self.chunks)}I", *self.chunks)

    @classmethod
    def decode(cls, data: bytes) -> Request:
        """Inverse of :meth:`encode`. Raises :class:`Violation`."""
        numbers, rest = divmod(len(data) - HASH_BYTES - 1, 4)
        if numbers < 0 or rest or data[HASH_BYTES] > 1:
            raise Violation("not a request for a blob")
        chunks = struct.unpack_from(f"<{numbers}I", data, HASH_BYTES + 1)
        return cls(data[:HASH_BYTES], bool(data[HASH_BYTES]), chunks)


class BlobServer:
    """Blobs that this node serves. A blob added twice is served until it was removed twice.

    The public methods are documented in :class:`~psyche.network.transport.BlobTransport`.
    """

    def __init__(self, streams: Streams, limiter: Limiter) -> None:
        self._streams, self._limiter = streams, limiter
        self._entries: dict[bytes, list[_Entry]] = {}
        self._threads = ThreadPoolExecutor(UPLOADS, "upload")

    async def start(self) -> None:
        """Answer requests from now on."""
        await self._streams.serve(PROTOCOL, self._serve, at_once=UPLOADS)

    def close(self) -> None:
        """Release the threads. Call it after the streams were closed."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def add(self, index: BlobIndex, read: ReadChunk) -> None:
        self._put(index.root, _Entry(lambda: index, read, live=True))

    def add_unread(self, root: bytes, load: Callable[[], BlobIndex], read: ReadChunk) -> None:
        self._put(root, _Entry(load, read, live=True))

    def add_blob(self, blob: Blob) -> None:
        self._put(blob.index.root, _Entry(lambda: blob.index, blob.__getitem__, live=False))

    def add_bytes(self, data: bytes) -> bytes:
        index, parts = index_blob(data), list(chunked(data))
        self._put(index.root, _Entry(lambda: index, parts.__getitem__, live=False))
        return index.root

    def remove(self, root: bytes, read: ReadChunk | None = None) -> None:
        entries = self._entries.get(root, [])
        for number, entry in enumerate(entries):
            if read is None or entry.read == read:
                del entries[number]
                break
        if not entries:
            self._entries.pop(root, None)

    def remove_blob(self, blob: Blob) -> None:
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
                    pipe.interrupt()  # the thread may be blocked on a caller that does not read
                    await asyncio.wait([answering])
                    raise
                frame = await stream.next_request(REQUEST_BYTES)
                if frame is None:
                    return
                request = Request.decode(frame)
        finally:
            pipe.close()

    def _answer(self, pipe: Pipe, request: Request) -> None:
        """Send the answer to one request. Runs on a thread."""
        index = self._index(request.root)
        if any(number >= index.chunks for number in request.chunks):
            raise Refused(f"the blob has only {index.chunks} chunks")
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
        """Return the index of a served blob. Raises :class:`Refused`."""
        for entry in reversed(self._entries.get(root, [])):
            with contextlib.suppress(OSError, LookupError):
                return entry.index
        raise Refused("does not have it")

    def _chunk(self, root: bytes, number: int) -> bytes | None:
        """A copy of one chunk (live state may change while it is sent), or None if it no longer matches its hash."""
        for entry in reversed(self._entries.get(root, [])):
            try:
                chunk = bytes(entry.read(number))
                if not entry.live or entry.index.matches(number, chunk):
                    return chunk
            except (OSError, LookupError):
                continue
        return None
