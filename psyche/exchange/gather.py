"""gather: every node fetches every payload. It trusts no reducer; its cost grows with the number of peers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from psyche.exchange.base import Exchange
from psyche.numerics.aggregate import Gradient
from psyche.protocol.messages import Contribution, Record


class Gather(Exchange):
    """Every node aggregates everything. A payload is persisted on arrival, while the others are still in transit."""

    def needed_slices(self) -> Sequence[int]:
        return range(len(self.layout.counts))

    async def publish(self, payload: Sequence[bytes]) -> None:
        await super().publish(payload)
        await self.store.persist(self.plan.round, self.payloads[self.me])

    async def fetch_payload(self, author: str, contribution: Contribution) -> None:
        await super().fetch_payload(author, contribution)
        await self.store.persist(self.plan.round, self.payloads[author])

    async def outer_gradient(self, record: Record) -> Gradient:
        await asyncio.gather(*(self.fetch_payload(one.node, one.contribution) for one in record.accepted))
        contributions = {one.node: one.contribution for one in record.accepted}
        return self.aggregation.gradient(self.layout.codec, self.plan, contributions, self.payloads)
