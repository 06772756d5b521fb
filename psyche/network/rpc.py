"""Request and response between peers, both opaque bytes of bounded length."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from psyche.network.streams import STALL_SECONDS, Busy, Stream, Streams, Unreachable

CALLS_AT_ONCE = 512
"""Calls of one name that are answered at once. A member that waits for news from a coordinator holds one."""

Handler = Callable[[str, bytes], Awaitable[bytes]]
"""(PeerID of the caller, request) -> reply. Raise ``Refused(reason)`` to say no."""


class Rpc:
    """Calls by name over streams: one request frame, then a status and one reply frame."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    async def serve(self, name: str, handler: Handler, *, max_request: int) -> None:
        """Answer calls of ``name`` whose request has at most ``max_request`` bytes.

        The caller's PeerID is authenticated by the connection. ``Refused`` reaches the caller with its reason;
        any other exception is logged here and reaches it as "internal error".
        """

        async def answer(stream: Stream) -> None:
            reply = await handler(stream.peer_id, await stream.read_request(max_request))
            await stream.accept()
            await stream.write_frame(reply)

        await self._streams.serve(name, answer, at_once=CALLS_AT_ONCE)

    async def call(
        self,
        peer_id: str,
        name: str,
        request: bytes,
        *,
        timeout: float,  # noqa: ASYNC109  # the caller should not have to know that a lost peer is a TimeoutError
        max_reply: int,
    ) -> bytes:
        """The reply of ``peer_id`` to a request, at most ``max_reply`` bytes, within ``timeout`` seconds in all.

        A busy peer is asked again until then. Raises Unreachable, Refused, or Violation (a malformed or longer
        reply); the message says who.
        """
        try:
            async with asyncio.timeout(timeout):
                while True:
                    try:
                        return await self._call(peer_id, name, request, max_reply, timeout)
                    except Busy:
                        await asyncio.sleep(random.uniform(0.05, 0.5))
        except TimeoutError:
            raise Unreachable(peer_id, f"did not answer {name} within {timeout:g} s") from None

    async def _call(self, peer_id: str, name: str, request: bytes, max_reply: int, patience: float) -> bytes:
        async with self._streams.open(peer_id, name) as stream:
            await stream.write_frame(request)
            await stream.expect(patience)
            return await stream.read_frame(max_reply, STALL_SECONDS)
