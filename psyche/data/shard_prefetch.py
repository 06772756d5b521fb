"""Prefetching: the training shards that this node needs are on its disk before it needs them.

The plan determines this round's shards. The next round continues where this round's range of positions ends
(``protocol/assignment.py``), but which member gets which part is drawn only when it is planned. So the whole range is
prefetched if it is a few shards, which often are open already.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from psyche.config import Run
from psyche.data.cache import CacheFull, Incoming, ShardCache
from psyche.data.index import Shard
from psyche.data.provision import ShardOffers
from psyche.data.shard_sources import ShardSources
from psyche.data.token_store import BadShard, Split
from psyche.durable import disk_errors
from psyche.errors import PsycheError
from psyche.protocol.assignment import next_position, positions, shards
from psyche.protocol.messages import Plan
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog
from psyche.telemetry.formatting import size

AHEAD = 4
"""Most shards of a range that is prefetched. Of a longer range, this node would use only a small part."""
AT_ONCE = 2
"""Shards fetched concurrently: the one that is needed and the next."""
POLL_SECONDS = 0.5
EVENT_SECONDS = 1.0
"""Minimum time between two Downloading events of a shard."""


class ShardPrefetcher:
    """Prefetches nothing: for nodes whose training data is all on this disk."""

    def prefetch_from(self, position: int) -> None:
        """Fetch what a round that begins at ``position`` probably needs."""

    def prefetch_after(self, plan: Plan) -> None:
        """Fetch what the round after ``plan`` probably needs."""

    async def wait_prefetched(self) -> None:
        """Wait until the prefetched shards are open or unavailable."""

    async def wait_ready(self, plan: Plan, node: str, closed: Callable[[], bool]) -> None:
        """Wait until the shards of ``node``'s part of a round are open, then :meth:`prefetch_after` that round.

        Stops waiting at the first unavailable shard, and when ``closed()`` is true.
        """

    async def close(self) -> None:
        """Stop fetching."""


class SwarmShardPrefetcher(ShardPrefetcher):
    """Keeps the shards of this and the next round open, and fetches the missing ones from mirrors and members."""

    def __init__(
        self, run: Run, split: Split, cache: ShardCache, shard_sources: ShardSources, offers: ShardOffers, log: EventLog
    ) -> None:
        self._run, self._split, self._cache = run, split, cache
        self._shard_sources, self._offers, self._log = shard_sources, offers, log
        self._now: list[int] = []
        self._fetching: dict[int, asyncio.Task[bool]] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._prefetching: asyncio.Task[None] | None = None
        self._warned: set[str] = set()

    def prefetch_from(self, position: int) -> None:
        rounds, batch = self._run.rounds, self._run.inner.batch_size
        steps = rounds.start_members * (rounds.inner_steps + self._run.overlap.overlap_steps)
        self._prefetch(range(position, position + steps * batch), least=1)  # to warm up on

    async def wait_ready(self, plan: Plan, node: str, closed: Callable[[], bool]) -> None:
        self._shard_sources.set_members([member.node for member in plan.members])
        self._now = self._shards(positions(plan, node, self._run.inner.batch_size, self._run.overlap.overlap_steps))
        absent = [number for number in self._now if not self._split.is_open(number)]
        if any(not self._split.copies(number) for number in absent):
            names = ", ".join(self._split.shards[number].file for number in absent)
            self._inform(f"round {plan.round} waits for the download of {names}")
        fetches = [self._start_opening(number) for number in absent]
        for fetch in fetches:
            while not fetch.done() and not closed():
                await asyncio.wait({fetch}, timeout=POLL_SECONDS)
            if not fetch.done() or not fetch.result():
                break
        self.prefetch_after(plan)

    def prefetch_after(self, plan: Plan) -> None:
        begin = next_position(plan, self._run.inner.batch_size, self._run.overlap.overlap_steps)
        self._prefetch(range(begin, 2 * begin - plan.position))

    async def wait_prefetched(self) -> None:
        while (task := self._prefetching) is not None and not task.done():
            await asyncio.wait({task})

    async def close(self) -> None:
        tasks = [*self._fetching.values(), *([self._prefetching] if self._prefetching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _shards(self, span: range) -> list[int]:
        return shards(span, self._split.layout, self._run.seed)

    def _prefetch(self, span: range, least: int = 0) -> None:
        ahead = self._shards(span)
        ahead = ahead if len(ahead) <= AHEAD else ahead[:least]
        self._split.close_all_but([*self._now, *ahead])
        if self._prefetching is not None:
            self._prefetching.cancel()
        self._prefetching = asyncio.create_task(self._open_all(ahead))

    async def _open_all(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if not await asyncio.shield(self._start_opening(number)):
                return

    # ---------------------------------------------------------------------------------- one shard

    def _start_opening(self, number: int) -> asyncio.Task[bool]:
        """Start a task that opens a shard, fetching it if needed; its result is False if the shard is unavailable."""
        task = self._fetching.get(number)
        if task is None:
            task = self._fetching[number] = asyncio.create_task(self._open_or_fetch(number))
            task.add_done_callback(lambda _: self._fetching.pop(number, None))
        return task

    async def _open_or_fetch(self, number: int) -> bool:
        if await self._open(number):
            return True
        async with self._slots:
            try:
                await self._fetch(number)
            except CacheFull as error:
                if number in self._now:
                    self._warn(str(error))
                return False
            except PsycheError as error:
                self._warn(f"{error}; until this node has it, it cannot train on it")
                return False
        if not await self._open(number):
            return False
        self._offers.add(number)
        return True

    async def _open(self, number: int) -> bool:
        """Open a good local copy and return whether there is one. Deletes corrupt copies from the cache."""
        shard = self._split.shards[number]
        try:
            await asyncio.to_thread(self._split.open, number)
        except BadShard as error:
            for path in error.corrupt:
                if path == self._cache.path_of(shard):
                    self._cache.drop(shard)
                self._warn(f"{path} is corrupt: {shard.file} is fetched again")
            return False
        self._cache.used(shard)
        return True

    async def _fetch(self, number: int) -> None:
        """Fetch a shard into the cache. Raises :class:`PsycheError`."""
        began, shard = time.monotonic(), self._split.shards[number]
        incoming = await self._claim(number)
        if incoming is None:
            return
        with disk_errors(self._cache.directory), incoming:
            source = await self._shard_sources.fetch(shard, shard.file, incoming.descriptor, self._progress(shard))
            await asyncio.to_thread(incoming.keep)
        self._inform(f"{shard.file} ({size(shard.bytes)}) fetched from {source} in {time.monotonic() - began:.1f} s")

    async def _claim(self, number: int) -> Incoming | None:
        """Return the file to fetch a shard into; None if another process of this machine has fetched it meanwhile."""
        shard = self._split.shards[number]
        while True:
            with disk_errors(self._cache.directory):
                try:
                    incoming = await asyncio.to_thread(self._cache.claim, shard)
                except CacheFull:
                    if number not in self._now:
                        raise
                    self._split.close_all_but(self._now)  # evict what is only prefetched
                    incoming = await asyncio.to_thread(self._cache.claim, shard)
            if not self._cache.locks:
                self._warn(
                    f"the file system of {self._cache.directory} has no locks: processes that share it may fetch a "
                    "shard twice and delete shards in use; give each process its own node.cache"
                )
            if incoming is not None and not self._cache.path_of(shard).exists():
                return incoming
            if incoming is not None:
                incoming.close()
                return None
            await asyncio.sleep(POLL_SECONDS)

    def _progress(self, shard: Shard) -> Callable[[int], None]:
        """Return a callback that emits Downloading events, at most one per EVENT_SECONDS."""
        last = 0.0

        def progress(received: int) -> None:
            nonlocal last
            if time.monotonic() - last >= EVENT_SECONDS or received >= shard.bytes:
                last = time.monotonic()
                self._log.emit(events.Downloading(what=shard.file, received=received, total=shard.bytes))

        return progress

    def _inform(self, text: str) -> None:
        self._log.emit(events.Notice(level="info", text=text))

    def _warn(self, text: str) -> None:
        if text not in self._warned:  # a retry in each round warns once
            self._warned.add(text)
            self._log.emit(events.Notice(level="warning", text=text))
