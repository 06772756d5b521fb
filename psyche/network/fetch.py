"""Fetching blobs: from several sources at once, chunk by chunk, believed from nobody.

A caller names a root and peers who may have the blob. The first source is asked alone; others join it when it fails or
when the blob takes long, and whoever is fast gets more to do. Chunks are checked against the root before they count,
so any failure (dead, stalled, lying, moved on) costs the source, not the transfer: what is missing comes from the
others. Callers start at different chunks, so that what a slow line gave one of them need not cross it again.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from typing_extensions import Buffer

from psyche.errors import PsycheError
from psyche.network.blobs import NAME
from psyche.network.download import Content, Download, OnLiar
from psyche.network.pipe import Pipe
from psyche.network.spool import Blob
from psyche.network.streams import STALL_SECONDS, Busy, Refused, Unreachable, Violation
from psyche.numerics.digest import CHUNK, BlobIndex, chunk_count, digest, index_blob

if TYPE_CHECKING:
    from psyche.network.node import NetworkNode

SPREAD_SECONDS = 1.0
"""A transfer that takes longer gets one more source each time this passes."""
BUSY_SECONDS = 60.0
"""How long a fetch keeps asking sources that are all busy, without any progress."""


class FetchError(PsycheError):
    """No source could give a blob. ``reasons`` says why not, by PeerID."""

    def __init__(self, root: bytes, reasons: dict[str, str]) -> None:
        told = "; ".join(f"{peer_id} {reason}" for peer_id, reason in reasons.items()) or "nobody is known to have it"
        super().__init__(f"could not fetch blob {root.hex()[:12]}: {told}")
        self.root, self.reasons = root, reasons
        self.partial: Blob | None = None
        """What :func:`fetch_blob` got of it, to go on with; served meanwhile."""


class BadBlob(FetchError):
    """What the root stands for is not what it should be: no source is at fault, but whoever named the root."""

    def __init__(self, root: bytes, fault: str) -> None:
        super().__init__(root, {})
        self.args = (fault,)


async def fetch_blob(
    network: NetworkNode,
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
    on_liar: OnLiar | None = None,
) -> Blob:
    """Fetch chunks of a blob (all by default) into the spool; it is served to others from the first chunk on.

    ``accept`` raises ``ValueError`` for an index, of at most ``max_chunks``, that is not wanted, and ``check`` (on a
    worker thread) for a chunk whose content is not acceptable. ``chunk_bytes`` is the usual size of a chunk, if that
    is known: then the first request need not wait for the index. ``into`` goes on with a blob fetched in part.
    ``stall``: seconds without progress (not in all) after which a source is given up. ``on_liar`` hears of each source
    that broke the protocol, also when the fetch then succeeds.

    Raises :class:`BadBlob`, :class:`FetchError` when no source is left, and ``PsycheError`` when the disk is full.
    """
    made: list[Blob] = []

    def create(index: BlobIndex) -> Blob:
        accept(index)
        blob = network.spool.create(index) if into is None else into
        made.append(blob)
        if into is None:
            network.blobs.add_blob(blob)
        return blob

    known = None if into is None else into.index
    download = Download(network.peer_id, root, create, max_chunks, chunks, chunk_bytes, check, stall, known)
    try:
        await _run(network, download, rotated(sources, network.peer_id, root, keep_first=True), 1, on_liar)
    except BaseException as error:
        if isinstance(error, FetchError) and not isinstance(error, BadBlob):
            error.partial = made[0] if made else None
        elif into is None and made:
            network.blobs.remove(root)
        raise
    return made[0]


async def fetch(
    network: NetworkNode,
    root: bytes,
    *,
    sources: Sequence[str],
    max_size: int,
    size: int | None = None,
    stall: float = STALL_SECONDS,
    on_liar: OnLiar | None = None,
) -> bytearray:
    """Fetch a byte string into memory: at most ``max_size`` bytes, exactly ``size`` where that is known.

    ``sources`` are PeerIDs, tried in an order rotated by our own, so that a crowd of callers spreads. Otherwise as
    :func:`fetch_blob`, but that it is not served.
    """
    if size is not None and size > max_size:
        raise ValueError(f"a blob of {size} bytes cannot be fetched within {max_size}")
    data = bytearray()

    def create(index: BlobIndex) -> Content:
        if index.size > max_size or (size is not None and index.size != size):
            raise ValueError("a blob of another size than agreed")
        data.extend(bytes(index.size))
        return _Memory(index, data)

    download = Download(network.peer_id, root, create, max(1, chunk_count(max_size)), None, None, None, stall, None)
    await _run(network, download, rotated(sources, network.peer_id, root), 1, on_liar)
    return data


async def fetch_into(
    network: NetworkNode,
    root: bytes,
    target: Buffer,
    *,
    sources: Sequence[str],
    order: Sequence[int] | None = None,
    gave: Counter[str] | None = None,
    parallel: int = 4,
    stall: float = STALL_SECONDS,
    on_liar: OnLiar | None = None,
) -> None:
    """Fetch a blob of exactly ``target``'s size into that writable, contiguous buffer.

    As :func:`fetch`, otherwise. After a :class:`FetchError` what has come is in ``target``; what is right in it where
    ``gave`` is not empty does not come again. ``gave`` is told how many bytes came from each source. ``order`` is that
    of all chunks, of ``CHUNK`` bytes, on a ring that each caller enters elsewhere.
    """
    size = memoryview(target).nbytes
    there = await asyncio.to_thread(index_blob, target) if gave else None

    def create(index: BlobIndex) -> Content:
        if index.size != size:
            raise ValueError("a blob of another size than agreed")
        return _Memory(index, target, there)

    most, guess = max(1, chunk_count(size)), None if there else CHUNK
    download = Download(network.peer_id, root, create, most, order, guess, None, stall, None)
    try:
        await _run(network, download, rotated(sources, network.peer_id, root), parallel, on_liar)
    finally:
        if gave is not None:
            gave.update(download.gave)


def rotated(sources: Sequence[str], caller: str, root: bytes, *, keep_first: bool = False) -> list[str]:
    """The order in which ``caller`` tries the sources of a blob: each but itself once, starting anywhere.

    With ``keep_first`` the first one, a blob's author, stays in front.
    """
    unique = [peer_id for peer_id in dict.fromkeys(sources) if peer_id != caller]
    first, others = (unique[:1], unique[1:]) if keep_first and sources[0] != caller else ([], unique)
    if not others:
        return first
    start = int.from_bytes(digest("fetch order", caller.encode(), root)[:8], "big") % len(others)
    return [*first, *others[start:], *others[:start]]


class _Memory:
    """A blob in a buffer."""

    def __init__(self, index: BlobIndex, buffer: Buffer, there: BlobIndex | None = None) -> None:
        """``there`` is what ``buffer`` holds now, where some of that may be right."""
        self.index = index
        self._view = memoryview(buffer).cast("B")
        self._present = bytearray(index.chunks if there is None else index.shared(there))

    def present(self, number: int) -> bool:
        return bool(self._present[number])

    def write(self, number: int, chunk: Buffer) -> None:
        start = self.index.offsets[number]
        self._view[start : start + self.index.sizes[number]] = memoryview(chunk)
        self._present[number] = 1


async def _run(
    network: NetworkNode, download: Download, sources: list[str], parallel: int, on_liar: OnLiar | None
) -> None:
    """Let sources work on a download until it is complete. Those that are busy wait their turn again."""
    loop = asyncio.get_running_loop()
    reasons: dict[str, str] = {}
    waiting = list(sources)
    running: dict[asyncio.Future[None], str] = {}
    patient_until, progress = loop.time() + BUSY_SECONDS, 0

    def start(source: str) -> None:
        future: Future[None] = network.downloads.submit(_pull, network, download, source)
        task = asyncio.wrap_future(future)
        task.add_done_callback(_seen)
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
                again = _outcome(task, source, reasons, on_liar)
                if again and loop.time() < patient_until:
                    waiting.append(source)
                    await asyncio.sleep(random.uniform(0.1, 0.5))
            if waiting and not download.finished:
                start(waiting.pop(0))  # one failed, or it takes long
            if download.received > progress:
                progress, patient_until = download.received, loop.time() + BUSY_SECONDS
    finally:
        download.cancel()
        if running:
            await asyncio.wait(running)
            for task, source in running.items():
                _outcome(task, source, reasons, on_liar)
    if download.fault is not None:
        raise download.fault if isinstance(download.fault, PsycheError) else BadBlob(download.root, str(download.fault))


def _seen(task: asyncio.Future[None]) -> None:
    """Who is cancelled a second time does not wait for its sources: how they end is nobody's concern any more."""
    if not task.cancelled():
        task.exception()


def _outcome(task: asyncio.Future[None], source: str, reasons: dict[str, str], on_liar: OnLiar | None) -> bool:
    """Note how a source ended; whether it should be asked again."""
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
        reasons[source] = f"lied: {error}"
        if on_liar is not None:
            on_liar(source, str(error))
    return False


def _pull(network: NetworkNode, download: Download, source: str) -> None:
    """What one source does for a download. Runs on a thread."""
    with network.download_turns(source):
        _pull_now(network, download, source)


def _pull_now(network: NetworkNode, download: Download, source: str) -> None:
    if download.finished:
        return
    pipe = Pipe.open(network.control, source, NAME, network.traffic, network.download_limit)
    with download.attached(pipe):
        download.pull(
            pipe, lambda count, seconds: network.traffic.measured(source, down=True, count=count, seconds=seconds)
        )
