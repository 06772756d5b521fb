"""gather: every node fetches every payload. Nothing to trust; the cost grows with the number of peers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from psyche.network.blobs import FetchError, fetch
from psyche.network.node import NetworkNode
from psyche.numerics.codecs.base import Codec, MalformedPayload
from psyche.numerics.flat import FlatLayout
from psyche.protocol.envelope import MalformedMessage
from psyche.protocol.messages import MAX_PAYLOAD_TABLE, Contribution, Payload, Slice, decode


class BadPayload(Exception):
    """A payload has the hash its author committed to and still cannot be decoded: the author is at fault."""


class Gather:
    """Fetches, checks, keeps and serves the payloads of a round and of the one before it."""

    def __init__(self, network: NetworkNode, codec: Codec, layout: FlatLayout) -> None:
        self._network, self._codec = network, codec
        self._counts = [part.stop - part.start for part in layout.slices()]
        self._serving: list[list[bytes]] = [[]]

    async def offer(self, slices: Sequence[bytes]) -> None:
        """Serve a payload, slices and table of contents, to whoever asks from now on."""
        roots = [await asyncio.to_thread(self._network.blobs.add_bytes, part) for part in slices]
        table = Payload(tuple(Slice(root, len(part)) for root, part in zip(roots, slices, strict=True)))
        self._serving[-1] += [*roots, self._network.blobs.add_bytes(table.encode())]

    async def collect(self, author: str, contribution: Contribution, members: Sequence[str]) -> list[bytes]:
        """The slices of a contribution's payload, verified and decodable; served to others from now on.

        The author is asked first, then the other members. Raises ``FetchError`` where nobody has it,
        :class:`BadPayload` where its content is not what the codec allows.
        """
        table = await self._table(author, contribution, members)
        slices = []
        for number, (part, count) in enumerate(zip(table.slices, self._counts, strict=True)):
            data = await self._fetch(part.root, part.size, author, members)
            try:
                await asyncio.to_thread(self._codec.check, data, count)
            except MalformedPayload as error:
                raise BadPayload(f"slice {number}: {error}") from None
            slices.append(data)
        await self.offer(slices)
        return slices

    def next_round(self) -> None:
        """Stop serving what is two rounds old."""
        self._serving.append([])
        for root in self._serving.pop(0) if len(self._serving) > 2 else []:
            self._network.blobs.remove(root)

    async def _table(self, author: str, contribution: Contribution, members: Sequence[str]) -> Payload:
        """The table of contents, if it is that of a payload of this model in this codec."""
        data = await self._fetch(contribution.payload_root, None, author, members)
        try:
            table = decode(Payload, data)
        except MalformedMessage as error:
            raise BadPayload(str(error)) from None
        sizes = [part.size for part in table.slices]
        if len(sizes) != len(self._counts) or sum(sizes) != contribution.payload_bytes:
            raise BadPayload("its table of contents is not that of a payload of this model")
        if any(size > self._codec.payload_bytes(count) for size, count in zip(sizes, self._counts, strict=True)):
            raise BadPayload("a slice is larger than the codec can make it")
        return table

    async def _fetch(self, root: bytes, size: int | None, author: str, members: Sequence[str]) -> bytes:
        most = MAX_PAYLOAD_TABLE if size is None else size
        for sources in ([author], [author, *members]):
            try:
                return bytes(await fetch(self._network.streams, root, sources=sources, size=size, max_size=most))
            except FetchError:
                if len(sources) > 1:
                    raise
        raise AssertionError("the second attempt returns or raises")
