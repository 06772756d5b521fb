"""The state of one blob download: its index, the chunks still missing, and which source fetches which chunk."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from typing_extensions import Buffer

from psyche.errors import PsycheError
from psyche.network.blob_server import ABSENT, MAX_CHUNKS_PER_REQUEST, Request
from psyche.network.pipe import Pipe
from psyche.network.streams import OK
from psyche.network.transport import Refused, Unreachable, Violation
from psyche.numerics.digest import INDEX_BYTES, BlobIndex, digest

FIRST_BYTES = 1 << 20
"""Size of the first request to a source, whose speed is not known yet."""
AHEAD_SECONDS = 0.25
"""Seconds of a source's line that one request fills. Two requests are in flight, so that the line is never idle; more
would withhold chunks from faster sources."""
MAX_REQUESTED_BYTES = 4 << 20
RESCUE_SECONDS = 2.0
"""A chunk in flight for longer may be requested from a second source once no other chunk is left."""
RETRY_SECONDS = 0.5
"""Pause before a source that lacked a chunk is asked for it again: it may be fetching it itself."""

OnMeasured = Callable[[int, float], None]
"""Called with the bytes of a transfer and the seconds it took."""


class Content(Protocol):
    """Where the chunks of a download are written."""

    @property
    def index(self) -> BlobIndex: ...

    def present(self, number: int) -> bool: ...

    def write(self, number: int, chunk: Buffer) -> None: ...


class Download:
    """Shared by the threads that work on it, one per source."""

    def __init__(
        self,
        caller: str,
        root: bytes,
        create: Callable[[BlobIndex], Content],
        max_chunks: int,
        chunks: Iterable[int] | None,
        chunk_bytes: int | None,
        check: Callable[[int, bytes], None] | None,
        stall: float,
        known: BlobIndex | None,
    ) -> None:
        """``create`` makes the content for an index that matches the root, or raises ``ValueError`` to reject it."""
        self.root, self.stall, self._caller = root, stall, caller
        self.received = 0
        """Chunks received so far."""
        self.received_from: Counter[str] = Counter()
        """Bytes of new chunks, by source."""
        self.fault: Exception | None = None
        """Why the download was given up, for a reason that is no source's fault."""
        self._create, self._check, self._max_chunks = create, check, max_chunks
        self._missing = None if chunks is None else chunk_order(chunks, caller, root)
        """Missing chunks in this caller's order; None until the index says which chunks exist."""
        self._guess = chunk_bytes
        self._lock = threading.Condition()
        self._content: Content | None = None
        self._assigned: dict[int, tuple[str, float]] = {}
        self._lacking: dict[tuple[str, int], float] = {}
        self._pipes: set[Pipe] = set()
        self._over = False
        self._progress = time.monotonic()
        if known is not None:
            self._learn(known)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: the download is complete, rejected, or cancelled."""
        return self._over or self.fault is not None or self._complete()

    def cancel(self) -> None:
        """Wake and end all threads that work on this download."""
        with self._lock:
            self._over = True
            for pipe in self._pipes:
                pipe.interrupt()
            self._lock.notify_all()

    @contextmanager
    def attached(self, pipe: Pipe) -> Iterator[None]:
        """Register ``pipe`` for the block, so that :meth:`cancel` interrupts it; close it at the end."""
        with self._lock:
            self._pipes.add(pipe)
            if self._over:
                pipe.interrupt()
        try:
            yield
        finally:
            with self._lock:
                self._pipes.discard(pipe)
                for number in [n for n, (source, _) in self._assigned.items() if source == pipe.peer_id]:
                    del self._assigned[number]
                self._lock.notify_all()
            pipe.close()

    # ------------------------------------------------------------------------------- on a source's thread

    def pull(self, pipe: Pipe, measured: OnMeasured) -> None:
        """Fetch missing chunks over one pipe until none is missing. Raises the source's error if it ends early."""
        try:
            self._pull(pipe, measured)
        except Unreachable:
            if not self.finished:
                raise
        except (ValueError, PsycheError) as error:
            with self._lock:
                self.fault = self.fault or error
                self._lock.notify_all()

    def _pull(self, pipe: Pipe, measured: OnMeasured) -> None:
        budget = FIRST_BYTES
        pending: deque[tuple[bool, list[int]]] = deque()
        last = time.monotonic()
        while not self.finished:
            while len(pending) < 2 and not (pending and self._content is None):
                batch = self._assign(pipe.peer_id, budget, wait=not pending)
                index = self._content is None
                if not batch and not index:
                    break
                if not pending:
                    last = time.monotonic()
                request = Request(self.root, index, tuple(batch)).encode()
                pipe.send(memoryview(len(request).to_bytes(4, "big") + request), self.stall)
                pending.append((index, batch))
            if not pending:
                continue
            count = self._receive(pipe, *pending.popleft())
            now = time.monotonic()
            if count:
                measured(count, now - last)
                budget = min(max(int(count / max(now - last, 1e-3) * AHEAD_SECONDS), 1), MAX_REQUESTED_BYTES)
            last = now

    def _receive(self, pipe: Pipe, index: bool, batch: list[int]) -> int:
        """Read the answer to one request; return the bytes of the chunks in it."""
        pipe.expect(self.stall)
        if index:
            size = int.from_bytes(pipe.read(4, self.stall), "big")
            if size > INDEX_BYTES * self._max_chunks:
                raise Violation(f"an index of over {self._max_chunks} chunks")
            try:
                found = BlobIndex.decode(pipe.read(size, self.stall))
            except ValueError as error:
                raise Violation(str(error)) from None
            if found.root != self.root:
                raise Violation("an index that does not match the root")
            self._learn(found)
        count = 0
        for number in batch:
            count += self._receive_chunk(pipe, number)
        return count

    def _receive_chunk(self, pipe: Pipe, number: int) -> int:
        content = self._content
        assert content is not None
        status = pipe.read(1, self.stall)[0]
        if status == ABSENT:
            with self._lock:
                self._lacking[pipe.peer_id, number] = time.monotonic()
                self._release(pipe, number)
            return 0
        if status != OK:
            raise Violation(f"status byte {status}")
        chunk = bytearray(content.index.sizes[number])
        pipe.read_into(memoryview(chunk), self.stall)
        if not content.index.matches(number, chunk):
            raise Violation("a chunk that does not match its hash")
        new = 0
        if not content.present(number):
            if self._check is not None:
                self._check(number, bytes(chunk))
            content.write(number, chunk)
            new = len(chunk)
        with self._lock:
            self.received += 1
            self.received_from[pipe.peer_id] += new
            self._progress = time.monotonic()
            if self._missing is not None:
                self._missing.pop(number, None)
            self._release(pipe, number)
        return len(chunk)

    # ---------------------------------------------------------------------------------- assigning chunks

    def _assign(self, source: str, budget: int, *, wait: bool) -> list[int]:
        """Assign about ``budget`` bytes of chunks to ``source``; an empty list where none is available to it.

        With ``wait``, block until a chunk is available or the download has finished. Raises ``Refused`` where this
        source has nothing more to give and no other source makes progress.
        """
        with self._lock:
            while True:
                batch = self._pick(source, budget)
                if batch or not wait or self.finished or self._content is None:
                    return batch
                if len(self._pipes) == 1 or time.monotonic() - self._progress > self.stall:
                    raise Refused("has only some of the chunks")
                self._lock.wait(RETRY_SECONDS)

    def _pick(self, source: str, budget: int) -> list[int]:
        if self._missing is None or (self._content is None and self._guess is None):
            return []  # the index comes first
        now = time.monotonic()
        batch: list[int] = []
        for rescue in (False, True):
            for number in self._missing:
                if budget <= 0 or len(batch) == MAX_CHUNKS_PER_REQUEST:
                    break
                if self._available(source, number, now, rescue=rescue):
                    batch.append(number)
                    budget -= self._size(number)
            if batch:
                break
        for number in batch:
            self._assigned[number] = (source, now)
        return batch

    def _available(self, source: str, number: int, now: float, *, rescue: bool) -> bool:
        if now - self._lacking.get((source, number), -RETRY_SECONDS) < RETRY_SECONDS:
            return False
        if number not in self._assigned:
            return not rescue
        assignee, since = self._assigned[number]
        return rescue and assignee != source and now - since > RESCUE_SECONDS

    def _release(self, pipe: Pipe, number: int) -> None:
        if self._assigned.get(number, ("", 0.0))[0] == pipe.peer_id:
            del self._assigned[number]
        self._lock.notify_all()

    def _size(self, number: int) -> int:
        if self._content is not None:
            return self._content.index.sizes[number]
        return self._guess or FIRST_BYTES

    def _complete(self) -> bool:
        return self._content is not None and not self._missing

    def _learn(self, index: BlobIndex) -> None:
        """Adopt the first index that arrives. Raises ``ValueError`` where it is not acceptable."""
        with self._lock:
            if self._content is not None:
                return
            if self._missing is not None and any(number >= index.chunks for number in self._missing):
                raise ValueError(f"the blob has only {index.chunks} chunks")
            content = self._create(index)
            wanted = (
                chunk_order(range(index.chunks), self._caller, self.root) if self._missing is None else self._missing
            )
            self._missing = {number: None for number in wanted if not content.present(number)}
            self._content = content


def chunk_order(chunks: Iterable[int], caller: str, root: bytes) -> dict[int, None]:
    """Chunks in the order in which ``caller`` requests them, from a start that its PeerID and the root decide.

    So peers that fetch the same blob soon hold different parts of it to exchange.
    """
    wanted = list(dict.fromkeys(chunks))
    start = int.from_bytes(digest("chunk order", caller.encode(), root)[:8], "big") % max(1, len(wanted))
    return dict.fromkeys([*wanted[start:], *wanted[:start]])
