"""gather: every node fetches every payload. Nothing to trust; the cost grows with the number of peers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from psyche.network.blobs import FetchError, fetch
from psyche.network.node import NetworkNode
from psyche.numerics.codecs.base import Codec, MalformedPayload
from psyche.numerics.flat import FlatLayout
from psyche.protocol.messages import Contribution, Slice


class BadPayload(Exception):
    """A payload has the hash its author committed to and still cannot be decoded: the author is at fault."""


class Gather:
    """Fetches, checks, keeps and serves the payloads of a round and of the one before it."""

    def __init__(self, network: NetworkNode, codec: Codec, layout: FlatLayout) -> None:
        self._network, self._codec = network, codec
        self._counts = [part.stop - part.start for part in layout.slices()]
        self._serving: list[list[bytes]] = [[]]

    async def offer(self, payload: Sequence[bytes]) -> None:
        """Serve a payload to whoever asks from now on."""
        for part in payload:
            self._serving[-1].append(await asyncio.to_thread(self._network.blobs.add_bytes, part))

    async def collect(self, author: str, contribution: Contribution, members: Sequence[str]) -> list[bytes]:
        """The payload of a contribution, verified slice by slice and decodable; served to others from now on.

        The author is asked first, then the other members. Raises ``FetchError`` where nobody has it,
        :class:`BadPayload` where its content is not what the codec allows.
        """
        payload = []
        for number, (part, count) in enumerate(zip(contribution.slices, self._counts, strict=True)):
            try:
                data = await self._fetch(part, [author])
            except FetchError:
                data = await self._fetch(part, [author, *members])
            try:
                await asyncio.to_thread(self._codec.check, data, count)
            except MalformedPayload as error:
                raise BadPayload(f"slice {number}: {error}") from None
            payload.append(data)
        await self.offer(payload)
        return payload

    def next_round(self) -> None:
        """Stop serving what is two rounds old."""
        self._serving.append([])
        for root in self._serving.pop(0) if len(self._serving) > 2 else []:
            self._network.blobs.remove(root)

    async def _fetch(self, part: Slice, sources: Sequence[str]) -> bytes:
        network = self._network
        return bytes(await fetch(network.streams, part.root, sources=sources, size=part.size, max_size=part.size))
