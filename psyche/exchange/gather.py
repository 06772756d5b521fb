"""gather: every node fetches every payload. Nothing to trust; the cost grows with the number of peers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from psyche.exchange.base import Exchange
from psyche.numerics.aggregate import Gradient, gathered
from psyche.protocol.messages import Contribution, Record


class Gather(Exchange):
    """Everybody aggregates everything."""

    def part(self) -> Sequence[int]:
        return range(len(self.shape.counts))

    async def prepare(self, record: Record) -> Gradient:
        await asyncio.gather(*(self._keep(one.node, one.contribution) for one in record.accepted))
        tokens = {one.node: one.contribution.tokens for one in record.accepted}
        return gathered(self.shape.codec, tokens, self.payloads)

    async def _keep(self, author: str, given: Contribution) -> None:
        await self.collect(author, given)
        await self.wire.keep(self.plan.round, self.payloads[author])
