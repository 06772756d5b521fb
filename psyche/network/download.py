"""One blob on its way here: what is known of it, what is still wanted, and who is getting which chunk."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from typing_extensions import Buffer

from psyche.errors import PsycheError
from psyche.network.blobs import ABSENT, MAX_ASKED, Request
from psyche.network.pipe import Pipe
from psyche.network.streams import OK, Refused, Unreachable, Violation
from psyche.numerics.digest import INDEX_BYTES, BlobIndex, digest

FIRST_BYTES = 1 << 20
"""Asked of a source whose speed is not known yet."""
AHEAD_SECONDS = 0.25
"""How much of a source's line one request fills. Two are under way, so that it is never idle; more would keep chunks
from sources that are faster."""
MOST_BYTES = 4 << 20
RESCUE_SECONDS = 2.0
"""A chunk that has been on its way for longer may be asked of another source, too, once nothing else is left."""
RETRY_SECONDS = 0.5
"""A source that did not have a chunk is asked again after this: it may be fetching it itself."""

OnLiar = Callable[[str, str], None]
"""Called with (PeerID, what it did) for each source that broke the protocol."""
Measured = Callable[[int, float], None]
"""Called with bytes and the seconds they took."""


class Content(Protocol):
    """Where chunks go."""

    @property
    def index(self) -> BlobIndex: ...

    def present(self, number: int) -> bool: ...

    def write(self, number: int, chunk: Buffer) -> None: ...


class Download:
    """Shared by the threads that work on it, one for each source."""

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
        """``create`` makes the place for a blob of an index that is the root's; it raises ``ValueError`` to refuse."""
        self.root, self.stall, self._caller = root, stall, caller
        self.received = 0
        """Chunks so far."""
        self.gave: Counter[str] = Counter()
        """Bytes of chunks that were new, by source."""
        self.fault: Exception | None = None
        """Why it was given up, whoever the source."""
        self._create, self._check, self._max_chunks = create, check, max_chunks
        self._missing = None if chunks is None else ordered(chunks, caller, root)
        """Chunks still to come, in this caller's order; None before the index says which there are."""
        self._guess = chunk_bytes
        self._lock = threading.Condition()
        self._content: Content | None = None
        self._taken: dict[int, tuple[str, float]] = {}
        self._lacking: dict[tuple[str, int], float] = {}
        self._pipes: set[Pipe] = set()
        self._over = False
        self._progress = time.monotonic()
        if known is not None:
            self._learn(known)

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to do: complete, refused, or cancelled."""
        return self._over or self.fault is not None or self._complete()

    def cancel(self) -> None:
        """Wake and end all threads that work on it."""
        with self._lock:
            self._over = True
            for pipe in self._pipes:
                pipe.interrupt()
            self._lock.notify_all()

    @contextmanager
    def attached(self, pipe: Pipe) -> Iterator[None]:
        """While ``pipe`` is at work here, cancelling closes it."""
        with self._lock:
            self._pipes.add(pipe)
            if self._over:
                pipe.interrupt()
        try:
            yield
        finally:
            with self._lock:
                self._pipes.discard(pipe)
                for number in [n for n, (who, _) in self._taken.items() if who == pipe.peer_id]:
                    del self._taken[number]
                self._lock.notify_all()
            pipe.close()

    # ------------------------------------------------------------------------------- on the threads

    def pull(self, pipe: Pipe, measured: Measured) -> None:
        """Get what is missing over one pipe, until nothing is. Raises what ended it, if it was not completion."""
        try:
            self._pull(pipe, measured)
        except Unreachable:
            if not self.finished:
                raise
        except (ValueError, PsycheError) as error:
            with self._lock:
                self.fault = self.fault or error
                self._lock.notify_all()

    def _pull(self, pipe: Pipe, measured: Measured) -> None:
        budget = FIRST_BYTES
        asked: deque[tuple[bool, list[int]]] = deque()
        last = time.monotonic()
        while not self.finished:
            while len(asked) < 2 and not (asked and self._content is None):
                batch = self._take(pipe.peer_id, budget, wait=not asked)
                index = self._content is None
                if not batch and not index:
                    break
                if not asked:
                    last = time.monotonic()
                request = Request(self.root, index, tuple(batch)).encode()
                pipe.send(memoryview(len(request).to_bytes(4, "big") + request), self.stall)
                asked.append((index, batch))
            if not asked:
                continue
            count = self._receive(pipe, *asked.popleft())
            now = time.monotonic()
            if count:
                measured(count, now - last)
                budget = min(max(int(count / max(now - last, 1e-3) * AHEAD_SECONDS), 1), MOST_BYTES)
            last = now

    def _receive(self, pipe: Pipe, index: bool, batch: list[int]) -> int:
        """Read the answer to one request; bytes of the chunks in it."""
        pipe.expect(self.stall)
        if index:
            size = int.from_bytes(pipe.read(4, self.stall), "big")
            if size > INDEX_BYTES * self._max_chunks:
                raise Violation("an index of more chunks than the blob may have")
            try:
                found = BlobIndex.decode(pipe.read(size, self.stall))
            except ValueError as error:
                raise Violation(str(error)) from None
            if found.root != self.root:
                raise Violation("an index that is not the root's")
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
            self.gave[pipe.peer_id] += new
            self._progress = time.monotonic()
            if self._missing is not None:
                self._missing.pop(number, None)
            self._release(pipe, number)
        return len(chunk)

    # ------------------------------------------------------------------------------------ who gets what

    def _take(self, source: str, budget: int, *, wait: bool) -> list[int]:
        """Chunks for ``source`` to get now, about ``budget`` bytes of them; none where there is nothing for it.

        With ``wait`` it waits until there is something, or the download is over, or raises ``Refused`` where this
        source has nothing to give and there is nobody else, or none that makes progress.
        """
        with self._lock:
            while True:
                batch = self._pick(source, budget)
                if batch or not wait or self.finished or self._content is None:
                    return batch
                if len(self._pipes) == 1 or time.monotonic() - self._progress > self.stall:
                    raise Refused("it has only a part of it")
                self._lock.wait(RETRY_SECONDS)

    def _pick(self, source: str, budget: int) -> list[int]:
        if self._missing is None or (self._content is None and self._guess is None):
            return []  # the index comes first
        now = time.monotonic()
        batch: list[int] = []
        for rescue in (False, True):
            for number in self._missing:
                if budget <= 0 or len(batch) == MAX_ASKED:
                    break
                if self._available(source, number, now, rescue=rescue):
                    batch.append(number)
                    budget -= self._size(number)
            if batch:
                break
        for number in batch:
            self._taken[number] = (source, now)
        return batch

    def _available(self, source: str, number: int, now: float, *, rescue: bool) -> bool:
        if now - self._lacking.get((source, number), -RETRY_SECONDS) < RETRY_SECONDS:
            return False
        if number not in self._taken:
            return not rescue
        who, since = self._taken[number]
        return rescue and who != source and now - since > RESCUE_SECONDS

    def _release(self, pipe: Pipe, number: int) -> None:
        if self._taken.get(number, ("", 0.0))[0] == pipe.peer_id:
            del self._taken[number]
        self._lock.notify_all()

    def _size(self, number: int) -> int:
        if self._content is not None:
            return self._content.index.sizes[number]
        return self._guess or FIRST_BYTES

    def _complete(self) -> bool:
        return self._content is not None and not self._missing

    def _learn(self, index: BlobIndex) -> None:
        """Take the index, if it is the first and wanted. Raises ``ValueError`` where it is not."""
        with self._lock:
            if self._content is not None:
                return
            if self._missing is not None and any(number >= index.chunks for number in self._missing):
                raise ValueError("it has fewer chunks than are wanted")
            content = self._create(index)
            wanted = ordered(range(index.chunks), self._caller, self.root) if self._missing is None else self._missing
            self._missing = {number: None for number in wanted if not content.present(number)}
            self._content = content


def ordered(chunks: Iterable[int], caller: str, root: bytes) -> dict[int, None]:
    """Chunks in the order in which ``caller`` asks for them: its PeerID and the root decide where it starts, so that
    those who fetch one blob soon have different parts of it to give each other."""
    wanted = list(dict.fromkeys(chunks))
    start = int.from_bytes(digest("chunk order", caller.encode(), root)[:8], "big") % max(1, len(wanted))
    return dict.fromkeys([*wanted[start:], *wanted[:start]])
