"""gather: every node fetches every payload. Nothing to trust; the cost grows with the number of peers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from torch import Tensor

from psyche.exchange.base import Exchange, Gradient
from psyche.numerics.aggregate import aggregate, shares
from psyche.protocol.messages import Record


class Gather(Exchange):
    """Everybody aggregates everything."""

    def part(self) -> Sequence[int]:
        return range(len(self.shape.counts))

    async def prepare(self, record: Record) -> Gradient:
        await asyncio.gather(*(self.collect(one.node, one.contribution) for one in record.accepted))
        weights = shares({one.node: one.contribution.tokens for one in record.accepted})
        payloads, codec = self.payloads, self.shape.codec

        def gradient(number: int, out: Tensor) -> None:
            aggregate(codec, ((weight, payloads[node][number]) for node, weight in weights.items()), out)

        return gradient
