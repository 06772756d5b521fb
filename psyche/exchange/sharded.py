"""sharded: each slice is added up by a few nodes and sent to all; the cost per node does not grow with the peers.

A node sends each of its slices to that slice's k reducers, and fetches every group's result once: k + 1 payloads less
the share that is its own, 2(n−1)/n payloads for k = 1 and n nodes. So it is flat for many nodes, not for few: from 4
nodes to 16 it grows by a quarter, from 8 to 16 by 7 %. Aggregates are encoded once, without error feedback, and all
decode the same bytes; equal results of the reducers are the proof that they are right.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from psyche.exchange.base import BlobTransport, Exchange
from psyche.exchange.merge import Merge
from psyche.exchange.shape import Shape
from psyche.network.spool import Blob
from psyche.numerics.aggregate import Gradient, reduce_slice, result_gradient
from psyche.numerics.codecs.base import Codec
from psyche.protocol.messages import Contribution, Plan, Record, Reducing
from psyche.protocol.reduction import ReducerAssignment


class Sharded(Exchange):
    """Some reduce each group of slices; who, the board shows."""

    def __init__(self, wire: BlobTransport, plan: Plan, shape: Shape, merge: Merge, result_codec: Codec) -> None:
        super().__init__(wire, plan, shape, merge)
        self._result_codec = result_codec
        self._assignment: ReducerAssignment | None = None
        self._reduced_in: dict[int, int] = {}
        self._results: dict[bytes, Blob] = {}

    def drawn(self, reducing: Reducing) -> None:
        self._assignment = ReducerAssignment(
            reducing.reducer_order,
            frozenset(reducing.failed),
            reducing.reassigned,
            self.plan.reducers,
            len(self.shape.counts),
        )

    def part(self) -> Sequence[int]:
        assignment = self._assignment
        if assignment is None:
            return ()
        return sorted(number for group in assignment.duties(self.wire.me) for number in assignment.slices_of(group))

    def due(self, reducing: Reducing) -> Sequence[int]:
        assert self._assignment is not None
        if not reducing.selected or not set(reducing.selected) <= self.held:
            return []
        return [
            group for group in self._assignment.duties(self.wire.me) if self._reduced_in.get(group) != reducing.term
        ]

    async def reduce(self, reducing: Reducing, given: Mapping[str, Contribution]) -> Mapping[int, bytes]:
        assignment, groups = self._assignment, self.due(reducing)
        assert assignment is not None
        selected = {node: given[node] for node in reducing.selected}
        gradient = self.merge.gradient(self.shape.codec, self.plan, selected, self.payloads)
        found = {}
        for group in groups:
            parts = await asyncio.to_thread(self._add_up, gradient, assignment.slices_of(group))
            blob = await self.wire.shelf.put(parts)
            self._results[blob.index.root] = blob
            found[group] = blob.index.root
        self.reduced |= found
        self._reduced_in |= dict.fromkeys(groups, reducing.term)
        return found

    def _add_up(self, gradient: Gradient, slices: range) -> list[bytes]:
        return [reduce_slice(gradient, self._result_codec, number, self.shape.counts[number]) for number in slices]

    async def prepare(self, record: Record) -> Gradient:
        assignment = ReducerAssignment(
            record.reducer_order, frozenset(), (), self.plan.reducers, len(self.shape.counts)
        )
        results = await asyncio.gather(*(self._result(record, assignment, group) for group in range(assignment.groups)))

        def encoded(number: int) -> bytes:
            position, group = divmod(number, assignment.groups)
            return results[group][position]

        return result_gradient(self._result_codec, encoded)

    async def _result(self, record: Record, assignment: ReducerAssignment, group: int) -> Blob:
        """A group's result: this node's own, or from those who reduced it or fetched it before."""
        root = record.results[group]
        if root in self._results:
            await self.wire.keep(self.plan.round, self._results[root])
            return self._results[root]
        around = [*record.reducer_order[group:], *record.reducer_order[:group]]
        ours = [node for node in around if node not in record.dissenters]
        shape = Shape(self._result_codec, tuple(self.shape.counts[number] for number in assignment.slices_of(group)))
        # Which of its k reducers a node asks first, follows from its own place, so that they share the load.
        first = (self.members.index(self.wire.me) if self.wire.me in self.members else 0) % max(1, self.plan.reducers)
        sources = [*ours[first : first + 1], *ours, *self.members, *self.others]
        blob = await self.wire.fetch(root, sources, shape, range(len(shape.counts)))
        self._results[root] = blob
        await self.wire.keep(self.plan.round, blob)
        return blob
