"""Content-addressed blobs: served by whoever has them, believed from nobody.

A caller names a root (BLAKE3, see ``psyche.numerics.digest``) and a few peers who may have it. It learns the size
and the chunks' hashes first, checks those against the root, and only then asks for chunks; each is checked before
it counts. Any failure (dead, stalled, lying, moved on) costs the source, not the transfer: the next source
continues at the first chunk that is missing. One source at a time is used for a blob; many blobs load at once.

On the wire, after the stream opens: root -> OK, frame(u64 size ‖ hashes); u64 first ‖ u64 count -> count × (OK, chunk).
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from typing_extensions import Buffer

from psyche.errors import PsycheError
from psyche.network.streams import STALL_SECONDS, Busy, Refused, Stream, Streams, Unreachable, Violation
from psyche.numerics.digest import CHUNK, HASH_BYTES, BlobIndex, chunk_count, digest, index_blob

UPLOADS = 128
"""Blobs sent at once, one chunk of each in memory. Whoever comes later asks again until it is their turn."""
BUSY_SECONDS = 60.0
"""How long a fetch keeps asking sources that are all busy, without any progress."""

_NAME = "blob"
_SIZE = struct.Struct(">Q")
_RANGE = struct.Struct(">QQ")

ReadChunk = Callable[[int], "bytes | bytearray | memoryview"]
"""Number of a chunk -> its bytes. Runs on a worker thread; may raise OSError or LookupError when they are gone."""


class FetchError(PsycheError):
    """No source could give a blob. ``reasons`` says why not, by PeerID."""

    def __init__(self, root: bytes, reasons: dict[str, str]) -> None:
        told = "; ".join(f"{peer_id} {reason}" for peer_id, reason in reasons.items()) or "nobody is known to have it"
        super().__init__(f"could not fetch blob {root.hex()[:12]}: {told}")
        self.root, self.reasons = root, reasons


@dataclass(frozen=True, eq=False)
class _Entry:
    index: BlobIndex
    read: ReadChunk


class BlobServer:
    """What this node has to give. What was added twice is served until it was removed twice."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._entries: dict[bytes, list[_Entry]] = {}

    async def start(self) -> None:
        """Answer callers from now on."""
        await self._streams.serve(_NAME, self._serve, at_once=UPLOADS)

    def add(self, root: bytes, index: BlobIndex, read: ReadChunk) -> None:
        """Serve a blob whose chunks ``read`` gives on demand, each of the length its place in the blob demands.

        What ``read`` gives is checked before it is sent, so it may be live state: once that has moved on, callers
        hear "gone" and the entry is dropped.
        """
        self._entries.setdefault(root, []).append(_Entry(index, read))

    def add_bytes(self, data: bytes) -> bytes:
        """Serve a byte string, hashed here (so call it on a worker thread when it is large). Returns its root."""
        index, view = index_blob(data), memoryview(data)
        self.add(index.root, index, lambda number: view[number * CHUNK : (number + 1) * CHUNK])
        return index.root

    def remove(self, root: bytes) -> None:
        """Take back the oldest :meth:`add` of a blob, if there is one; after the last, also amid a transfer."""
        entries = self._entries.get(root)
        if entries:
            self._forget(root, entries[0])

    def _forget(self, root: bytes, entry: _Entry) -> None:
        entries = self._entries.get(root, [])
        if entry in entries:
            entries.remove(entry)
        if not entries:
            self._entries.pop(root, None)

    async def _serve(self, stream: Stream) -> None:
        root = await stream.read_request(HASH_BYTES)
        entries = self._entries.get(root)
        if not entries:
            raise Refused("does not have it")
        index = entries[-1].index
        await stream.accept()
        await stream.write_frame(_SIZE.pack(index.size) + index.hashes)
        first, count = _RANGE.unpack(await stream.read(_RANGE.size, STALL_SECONDS))
        if first + count > index.chunks:
            raise Refused("there are no such chunks")
        for number in range(first, first + count):
            chunk = await self._chunk(root, number)
            await stream.accept()
            await stream.write(chunk)

    async def _chunk(self, root: bytes, number: int) -> bytes:
        while entries := self._entries.get(root):
            entry = entries[-1]
            chunk = await asyncio.to_thread(_checked, entry, number)
            if chunk is not None:
                return chunk
            self._forget(root, entry)
        raise Refused("gone")


def _checked(entry: _Entry, number: int) -> bytes | None:
    """A copy of one chunk (the original may change while it is sent), or None if it is not what it was."""
    try:
        chunk = bytes(entry.read(number))
    except (OSError, LookupError):
        return None
    return chunk if entry.index.matches(number, chunk) else None


OnLiar = Callable[[str, str], None]
"""Called with (PeerID, what it did) for each source that broke the protocol, also when the fetch then succeeds."""


async def fetch(
    streams: Streams,
    root: bytes,
    *,
    sources: Sequence[str],
    max_size: int,
    size: int | None = None,
    stall: float = STALL_SECONDS,
    on_liar: OnLiar | None = None,
) -> bytearray:
    """Fetch a blob into memory: at most ``max_size`` bytes, exactly ``size`` where that is known.

    ``sources`` are PeerIDs, tried in an order rotated by our own, so that a crowd of callers spreads. ``stall``:
    seconds without progress (not in all) after which a source is given up. Raises :class:`FetchError` when no
    source is left.
    """
    if size is not None and size > max_size:
        raise ValueError(f"a blob of {size} bytes cannot be fetched within {max_size}")
    transfer = _Transfer(streams, root, max_size, size, None, stall)
    await transfer.run(rotated(sources, streams.peer_id, root), on_liar)
    assert isinstance(transfer.target, bytearray)
    return transfer.target


async def fetch_into(
    streams: Streams,
    root: bytes,
    target: Buffer,
    *,
    sources: Sequence[str],
    stall: float = STALL_SECONDS,
    on_liar: OnLiar | None = None,
) -> None:
    """Fetch a blob of exactly ``target``'s size into that writable, contiguous buffer, with no copy of it.

    As :func:`fetch`, otherwise. ``target`` may hold anything after a :class:`FetchError`.
    """
    size = memoryview(target).nbytes
    transfer = _Transfer(streams, root, size, size, target, stall)
    await transfer.run(rotated(sources, streams.peer_id, root), on_liar)


def rotated(sources: Sequence[str], caller: str, root: bytes) -> list[str]:
    """The order in which ``caller`` tries the sources of a blob: each but itself once, starting anywhere."""
    unique = [peer_id for peer_id in dict.fromkeys(sources) if peer_id != caller]
    if not unique:
        return []
    start = int.from_bytes(digest("fetch order", caller.encode(), root)[:8], "big") % len(unique)
    return unique[start:] + unique[:start]


@dataclass
class _Transfer:
    """A fetch under way: what is known of the blob, and how many chunks from its start have been verified."""

    streams: Streams
    root: bytes
    bound: int
    size: int | None
    target: Buffer | None
    stall: float
    done: int = 0

    async def run(self, sources: Sequence[str], on_liar: OnLiar | None) -> None:
        """Try the sources until one completes the blob; those that are busy wait their turn again."""
        reasons: dict[str, str] = {}
        queue = deque(sources)
        clock = asyncio.get_running_loop().time
        patient_until = clock() + BUSY_SECONDS
        while queue:
            source, before = queue.popleft(), self.done
            try:
                await self._from(source)
                return
            except Busy:
                reasons[source] = "is busy"
                if clock() < patient_until:
                    queue.append(source)
                    await asyncio.sleep(random.uniform(0.1, 0.5))
            except Unreachable as error:
                reasons[source] = error.reason
            except Refused as error:
                reasons[source] = f"refused: {error}"
            except Violation as error:
                reasons[source] = f"lied: {error}"
                if on_liar is not None:
                    on_liar(source, str(error))
            if self.done > before:
                patient_until = clock() + BUSY_SECONDS
        raise FetchError(self.root, reasons)

    async def _from(self, source: str) -> None:
        async with self.streams.open(source, _NAME) as stream:
            await stream.write_frame(self.root)
            await stream.expect(self.stall)
            limit = _SIZE.size + HASH_BYTES * chunk_count(self.bound)
            index = self._index(await stream.read_frame(limit, self.stall))
            if self.target is None:
                self.target = bytearray(index.size)
            await stream.write(_RANGE.pack(self.done, index.chunks - self.done))
            await self._chunks(stream, index, memoryview(self.target).cast("B"))

    def _index(self, frame: bytes) -> BlobIndex:
        if len(frame) < _SIZE.size:
            raise Violation("an index without a size")
        index = BlobIndex(_SIZE.unpack_from(frame)[0], frame[_SIZE.size :])
        if index.size > self.bound or (self.size is not None and index.size != self.size):
            raise Violation("a blob of another size than agreed")
        if not index.well_formed() or index.root != self.root:
            raise Violation("an index that is not the root's")
        return index

    async def _chunks(self, stream: Stream, index: BlobIndex, target: memoryview) -> None:
        """Read the missing chunks in order; while one is being read, the one before it is being hashed."""
        check: asyncio.Task[None] | None = None
        try:
            for number in range(self.done, index.chunks):
                await stream.expect(self.stall)
                chunk = target[number * CHUNK : (number + 1) * CHUNK]
                await stream.read_into(chunk, self.stall)
                if check is not None:
                    await check
                check = asyncio.create_task(self._check(index, number, chunk))
        finally:
            if check is not None:
                await check

    async def _check(self, index: BlobIndex, number: int, chunk: memoryview) -> None:
        if not await asyncio.to_thread(index.matches, number, chunk):
            raise Violation("a chunk that does not match its hash")
        self.done = number + 1
