"""gather: every node fetches every payload. Nothing to trust; the cost grows with the number of peers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from psyche.exchange.base import Exchange
from psyche.numerics.aggregate import Gradient
from psyche.protocol.messages import Contribution, Record


class Gather(Exchange):
    """Everybody aggregates everything. A payload is on disk soon after it is here: the others are still coming."""

    def part(self) -> Sequence[int]:
        return range(len(self.shape.counts))

    async def offer(self, payload: Sequence[bytes]) -> None:
        await super().offer(payload)
        await self.wire.keep(self.plan.round, self.payloads[self.wire.me])

    async def collect(self, author: str, given: Contribution) -> None:
        await super().collect(author, given)
        await self.wire.keep(self.plan.round, self.payloads[author])

    async def prepare(self, record: Record) -> Gradient:
        await asyncio.gather(*(self.collect(one.node, one.contribution) for one in record.accepted))
        given = {one.node: one.contribution for one in record.accepted}
        return self.merge.gradient(self.shape.codec, self.plan, given, self.payloads)
