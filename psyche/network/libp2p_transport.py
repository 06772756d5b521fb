"""Blobs over libp2p streams: :class:`~psyche.network.transport.BlobTransport` as every node has it.

A fetch asks the first source alone; others join when it fails or when the blob takes long, and faster sources get more
chunks. A chunk counts once its hash matches the root, so any failure (dead, stalled, lying, out of date) costs the
source, not the transfer: the missing chunks come from others. Callers start at different chunks, so that a chunk that
one of them received over a slow line need not cross that line again.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from typing_extensions import Buffer

from psyche.errors import PsycheError
from psyche.network.bandwidth import Limiter
from psyche.network.blob_server import PROTOCOL, BlobServer
from psyche.network.download import Content, Download
from psyche.network.pipe import Pipe
from psyche.network.spool import Blob, Spool
from psyche.network.streams import CALLS_PER_PEER, Streams
from psyche.network.transport import (
    STALL_SECONDS,
    BadBlob,
    Busy,
    FetchError,
    OnViolation,
    Refused,
    Unreachable,
    Violation,
    source_order,
)
from psyche.numerics.digest import CHUNK, BlobIndex, chunk_count, index_blob

SPREAD_SECONDS = 1.0
"""A running transfer gets one more source each time this passes."""
BUSY_SECONDS = 60.0
"""How long a fetch keeps asking sources that are all busy, without any progress."""
DOWNLOADS = 128
"""Streams that blobs are fetched over at once, with a thread and a chunk in memory each; more wait."""


class Libp2pTransport(BlobServer):
    """Serves blobs to streams that peers open, and fetches blobs over streams that it opens."""

    def __init__(
        self, streams: Streams, control: Path, spool: Path | None, max_upload: float | None, max_download: float | None
    ) -> None:
        """``control`` is the libp2p daemon's control socket; limits are in bytes per second."""
        super().__init__(streams, Limiter(max_upload))
        self.spool = Spool(spool)
        self.traffic = streams.traffic
        self.download_limit = Limiter(max_download)
        self._control, self._peer_id = control, streams.peer_id
        self._slots: dict[str, threading.Semaphore] = {}
        self._downloads = ThreadPoolExecutor(DOWNLOADS, "download")

    def close(self) -> None:
        super().close()
        self._downloads.shutdown(wait=False, cancel_futures=True)

    async def fetch_blob(
        self,
        root: bytes,
        *,
        sources: Sequence[str],
        max_chunks: int,
        accept: Callable[[BlobIndex], None] = lambda index: None,
        chunks: Iterable[int] | None = None,
        chunk_bytes: int | None = None,
        into: Blob | None = None,
        check: Callable[[int, bytes], None] | None = None,
        stall: float = STALL_SECONDS,
        on_violation: OnViolation | None = None,
    ) -> Blob:
        created: list[Blob] = []

        def create(index: BlobIndex) -> Blob:
            accept(index)
            blob = self.spool.create(index) if into is None else into
            created.append(blob)
            if into is None:
                self.add_blob(blob)
            return blob

        known = None if into is None else into.index
        download = Download(self._peer_id, root, create, max_chunks, chunks, chunk_bytes, check, stall, known)
        try:
            await self._run(download, source_order(sources, self._peer_id, root, keep_first=True), 1, on_violation)
        except BaseException as error:
            if isinstance(error, FetchError) and not isinstance(error, BadBlob):
                error.partial = created[0] if created else None
            elif into is None and created:
                self.remove(root)
            raise
        return created[0]

    async def fetch_bytes(
        self,
        root: bytes,
        *,
        sources: Sequence[str],
        max_size: int,
        size: int | None = None,
        stall: float = STALL_SECONDS,
        on_violation: OnViolation | None = None,
    ) -> bytearray:
        if size is not None and size > max_size:
            raise ValueError(f"a blob of {size} bytes cannot be fetched within {max_size}")
        data = bytearray()

        def create(index: BlobIndex) -> Content:
            if index.size > max_size or (size is not None and index.size != size):
                wanted = f"{size}" if size is not None else f"at most {max_size}"
                raise ValueError(f"blob {root.hex()[:12]} has {index.size} bytes, {wanted} expected")
            data.extend(bytes(index.size))
            return _Memory(index, data)

        download = Download(self._peer_id, root, create, max(1, chunk_count(max_size)), None, None, None, stall, None)
        await self._run(download, source_order(sources, self._peer_id, root), 1, on_violation)
        return data

    async def fetch_into(
        self,
        root: bytes,
        target: Buffer,
        *,
        sources: Sequence[str],
        order: Sequence[int] | None = None,
        received_from: Counter[str] | None = None,
        parallel: int = 4,
        stall: float = STALL_SECONDS,
        on_violation: OnViolation | None = None,
    ) -> None:
        size = memoryview(target).nbytes
        held = await asyncio.to_thread(index_blob, target) if received_from else None

        def create(index: BlobIndex) -> Content:
            if index.size != size:
                raise ValueError(f"blob {root.hex()[:12]} has {index.size} bytes, {size} expected")
            return _Memory(index, target, held)

        most, guess = max(1, chunk_count(size)), None if held else CHUNK
        download = Download(self._peer_id, root, create, most, order, guess, None, stall, None)
        try:
            await self._run(download, source_order(sources, self._peer_id, root), parallel, on_violation)
        finally:
            if received_from is not None:
                received_from.update(download.received_from)

    async def _run(
        self, download: Download, sources: list[str], parallel: int, on_violation: OnViolation | None
    ) -> None:
        """Run a download over its sources until it is complete. Busy sources are asked again later."""
        loop = asyncio.get_running_loop()
        reasons: dict[str, str] = {}
        waiting = list(sources)
        running: dict[asyncio.Future[None], str] = {}
        patient_until, progress = loop.time() + BUSY_SECONDS, 0

        def start(source: str) -> None:
            future: Future[None] = self._downloads.submit(self._pull, download, source)
            task = asyncio.wrap_future(future)
            task.add_done_callback(_retrieve_exception)
            running[task] = source

        try:
            while not download.finished:
                want = parallel if not running else 0
                for source in waiting[:want]:
                    start(source)
                del waiting[:want]
                if not running:
                    raise FetchError(download.root, reasons)
                done, _ = await asyncio.wait(running, timeout=SPREAD_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    source = running.pop(task)
                    again = _note_outcome(task, source, reasons, on_violation)
                    if again and loop.time() < patient_until:
                        waiting.append(source)
                        await asyncio.sleep(random.uniform(0.1, 0.5))
                if waiting and not download.finished:
                    start(waiting.pop(0))  # a source failed, or the transfer takes long
                if download.received > progress:
                    progress, patient_until = download.received, loop.time() + BUSY_SECONDS
        finally:
            download.cancel()
            if running:
                await asyncio.wait(running)
                for task, source in running.items():
                    _note_outcome(task, source, reasons, on_violation)
        if (fault := download.fault) is not None:
            raise fault if isinstance(fault, PsycheError) else BadBlob(download.root, str(fault))

    def _pull(self, download: Download, source: str) -> None:
        """Fetch chunks from one source, on a thread. A source serves CALLS_PER_PEER of our streams at once."""
        with self._slots.setdefault(source, threading.Semaphore(CALLS_PER_PEER)):
            if not download.finished:
                pipe = Pipe.open(self._control, source, PROTOCOL, self.traffic, self.download_limit)
                with download.attached(pipe):
                    download.pull(
                        pipe,
                        lambda count, seconds: self.traffic.measured(source, down=True, count=count, seconds=seconds),
                    )


def _retrieve_exception(task: asyncio.Future[None]) -> None:
    """Mark the exception as retrieved: a fetch that is cancelled twice does not wait for its sources."""
    if not task.cancelled():
        task.exception()


def _note_outcome(
    task: asyncio.Future[None], source: str, reasons: dict[str, str], on_violation: OnViolation | None
) -> bool:
    """Record how a source ended; return whether to ask it again."""
    try:
        task.result()
    except Busy:
        reasons[source] = "is busy"
        return True
    except Unreachable as error:
        reasons[source] = error.reason
    except Refused as error:
        reasons[source] = f"refused: {error}"
    except Violation as error:
        reasons[source] = f"broke the protocol: {error}"
        if on_violation is not None:
            on_violation(source, str(error))
    return False


class _Memory:
    """A blob in a buffer."""

    def __init__(self, index: BlobIndex, buffer: Buffer, held: BlobIndex | None = None) -> None:
        """``held`` is the index of what ``buffer`` holds now, where some of its chunks may be right."""
        self.index = index
        self._view = memoryview(buffer).cast("B")
        self._present = bytearray(index.chunks if held is None else index.shared(held))

    def present(self, number: int) -> bool:
        return bool(self._present[number])

    def write(self, number: int, chunk: Buffer) -> None:
        start = self.index.offsets[number]
        self._view[start : start + self.index.sizes[number]] = memoryview(chunk)
        self._present[number] = 1
