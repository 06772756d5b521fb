"""The training shards that this node needs, here before it needs them.

Which ones follows from the plan, and which ones come next nearly does: the next round goes on where this one's stretch
of positions ends (``protocol/assignment.py``). Who gets which part of it is drawn when it is planned, so the whole
stretch is fetched ahead, if that is a few shards; it often is what is open already.
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
"""Shards fetched before it is known who needs them. Of a longer stretch, most would be fetched for others."""
AT_ONCE = 2
"""Shards on their way: the one that is needed and the next."""
POLL_SECONDS = 0.5
EVENT_SECONDS = 1.0
"""At most one Downloading event of a shard in so long."""


class Supply:
    """What a worker asks of its text; where all of it is here, nothing comes of that."""

    def begin(self, position: int) -> None:
        """The run stands at ``position``: fetch what its next round probably takes."""

    def expect(self, plan: Plan) -> None:
        """Fetch what the round after ``plan`` probably takes."""

    async def begun(self) -> None:
        """Return once what is fetched ahead is open, or cannot be had."""

    async def ready(self, plan: Plan, node: str, closed: Callable[[], bool]) -> None:
        """Return once the shards of ``node``'s part of a round are open: all of them, or all before the first that
        cannot be had, or as many as there are when ``closed()``. Then :meth:`expect` the next round's.
        """

    async def close(self) -> None:
        """Fetch nothing any more."""


class ShardSupply(Supply):
    """Keeps open what is needed now and next, and fetches what of it is not here."""

    def __init__(
        self, run: Run, split: Split, cache: ShardCache, suppliers: ShardSources, offers: ShardOffers, log: EventLog
    ) -> None:
        self._run, self._split, self._cache = run, split, cache
        self._suppliers, self._offers, self._log = suppliers, offers, log
        self._now: list[int] = []
        self._fetching: dict[int, asyncio.Task[bool]] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._prefetching: asyncio.Task[None] | None = None
        self._told: set[str] = set()

    def begin(self, position: int) -> None:
        rounds, batch = self._run.rounds, self._run.inner.batch_size
        steps = rounds.start_members * (rounds.inner_steps + self._run.overlap.overlap_steps)
        self._prefetch(range(position, position + steps * batch), least=1)  # to warm up on

    async def ready(self, plan: Plan, node: str, closed: Callable[[], bool]) -> None:
        self._suppliers.meet([member.node for member in plan.members])
        self._now = self._shards(positions(plan, node, self._run.inner.batch_size, self._run.overlap.overlap_steps))
        absent = [number for number in self._now if not self._split.is_open(number)]
        if any(not self._split.copies(number) for number in absent):
            names = ", ".join(self._split.shards[number].file for number in absent)
            self._inform(f"round {plan.round} waits for {names}, which this node does not have yet")
        fetches = [self._obtain(number) for number in absent]
        for fetch in fetches:
            while not fetch.done() and not closed():
                await asyncio.wait({fetch}, timeout=POLL_SECONDS)
            if not fetch.done() or not fetch.result():
                break
        self.expect(plan)

    def expect(self, plan: Plan) -> None:
        begin = next_position(plan, self._run.inner.batch_size, self._run.overlap.overlap_steps)
        self._prefetch(range(begin, 2 * begin - plan.position))

    async def begun(self) -> None:
        while (task := self._prefetching) is not None and not task.done():
            await asyncio.wait({task})

    async def close(self) -> None:
        tasks = [*self._fetching.values(), *([self._prefetching] if self._prefetching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _shards(self, span: range) -> list[int]:
        return shards(span, self._split.shape, self._run.seed)

    def _prefetch(self, span: range, least: int = 0) -> None:
        ahead = self._shards(span)
        ahead = ahead if len(ahead) <= AHEAD else ahead[:least]
        self._split.close_all_but([*self._now, *ahead])
        if self._prefetching is not None:
            self._prefetching.cancel()
        self._prefetching = asyncio.create_task(self._obtain_all(ahead))

    async def _obtain_all(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if not await asyncio.shield(self._obtain(number)):
                return

    # --------------------------------------------------------------------------------- one shard

    def _obtain(self, number: int) -> asyncio.Task[bool]:
        """Have a shard open, whatever that takes. False where it cannot be had; that is said."""
        task = self._fetching.get(number)
        if task is None:
            task = self._fetching[number] = asyncio.create_task(self._obtained(number))
            task.add_done_callback(lambda _: self._fetching.pop(number, None))
        return task

    async def _obtained(self, number: int) -> bool:
        if await self._opened(number):
            return True
        async with self._turns:
            try:
                await self._fetch(number)
            except CacheFull as error:
                if number in self._now:
                    self._warn(str(error))
                return False
            except PsycheError as error:
                self._warn(f"{error}: as long as that is so, this node trains on none of it")
                return False
        if not await self._opened(number):
            return False
        self._offers.add(number)
        return True

    async def _opened(self, number: int) -> bool:
        """Whether a good copy is here. A bad one is said, and removed if it is the cache's."""
        shard = self._split.shards[number]
        try:
            await asyncio.to_thread(self._split.open, number)
        except BadShard as error:
            for path in error.corrupt:
                if path == self._cache.place(shard):
                    self._cache.drop(shard)
                self._warn(f"{path} is corrupt, so {shard.file} is fetched anew")
            return False
        self._cache.used(shard)
        return True

    async def _fetch(self, number: int) -> None:
        """Put a shard into the cache. Raises :class:`PsycheError`."""
        began, shard = time.monotonic(), self._split.shards[number]
        incoming = await self._claimed(number)
        if incoming is None:
            return
        with disk_errors(self._cache.directory), incoming:
            giver = await self._suppliers.fetch(shard, shard.file, incoming.descriptor, self._progress(shard))
            await asyncio.to_thread(incoming.keep)
        self._inform(f"{shard.file} ({size(shard.bytes)}) came from {giver} in {time.monotonic() - began:.1f} s")

    async def _claimed(self, number: int) -> Incoming | None:
        """The file to fetch a shard into; None where another process of this machine has fetched it meanwhile."""
        shard = self._split.shards[number]
        while True:
            with disk_errors(self._cache.directory):
                try:
                    incoming = await asyncio.to_thread(self._cache.claim, shard)
                except CacheFull:
                    if number not in self._now:
                        raise
                    self._split.close_all_but(self._now)  # what may be needed next makes way
                    incoming = await asyncio.to_thread(self._cache.claim, shard)
            if not self._cache.locks:
                self._warn(
                    f"the file system of {self._cache.directory} has no locks: processes that share it may fetch the "
                    "same twice, and remove what others use; give each a node.cache of its own"
                )
            if incoming is not None and not self._cache.place(shard).exists():
                return incoming
            if incoming is not None:
                incoming.close()
                return None
            await asyncio.sleep(POLL_SECONDS)

    def _progress(self, shard: Shard) -> Callable[[int], None]:
        """Tells how far a shard has come, now and then."""
        told = 0.0

        def progress(received: int) -> None:
            nonlocal told
            if time.monotonic() - told >= EVENT_SECONDS or received >= shard.bytes:
                told = time.monotonic()
                self._log.emit(events.Downloading(what=shard.file, received=received, total=shard.bytes))

        return progress

    def _inform(self, text: str) -> None:
        self._log.emit(events.Notice(level="info", text=text))

    def _warn(self, text: str) -> None:
        if text not in self._told:  # what is tried again each round is said once
            self._told.add(text)
            self._log.emit(events.Notice(level="warning", text=text))
