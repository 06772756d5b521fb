"""Request and response between peers, both opaque bytes of bounded length.

A stream serves one call after another and is kept for the next: opening one takes both daemons milliseconds, and on a
long line a round trip or two, and a round consists of many small calls to the same peer.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable

from psyche.network.streams import Stream, Streams
from psyche.network.transport import STALL_SECONDS, Busy, Unreachable

CALLS_AT_ONCE = 512
"""Streams of calls of one name that are served at once. A member that waits for news from a coordinator holds one."""
KEPT_SECONDS = STALL_SECONDS / 2
"""How long an idle stream is kept, one for each peer and name; its server closes it after STALL_SECONDS."""

Handler = Callable[[str, bytes], Awaitable[bytes]]
"""(PeerID of the caller, request) -> reply. Raise ``Refused(reason)`` to say no."""


class Rpc:
    """Calls by name over streams: a request frame, then a status and a reply frame; a refusal ends the stream."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._kept: dict[tuple[str, str], tuple[Stream, asyncio.TimerHandle]] = {}

    def close(self) -> None:
        """Close all streams."""
        for line in list(self._kept):
            if (stream := self._idle(line)) is not None:
                stream.close()

    async def serve(self, name: str, handler: Handler, *, max_request: int) -> None:
        """Answer calls of ``name`` whose request has at most ``max_request`` bytes.

        The caller's PeerID is authenticated by the connection. ``Refused`` reaches the caller with its reason;
        any other exception is logged here and reaches it as "internal error". A call may reach ``handler`` twice.
        """

        async def answer(stream: Stream) -> None:
            request: bytes | None = await stream.read_request(max_request)
            while request is not None:
                reply = await handler(stream.peer_id, request)
                await stream.accept()
                await stream.write_frame(reply)
                request = await stream.next_request(max_request)

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
        """Return the reply of ``peer_id`` to a request, at most ``max_reply`` bytes, within ``timeout`` seconds in all.

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
        line = peer_id, name
        if (stream := self._idle(line)) is not None:
            with contextlib.suppress(Unreachable):  # it may have ended since, with the peer or without
                return await self._ask(line, stream, request, max_reply, patience)
        return await self._ask(line, await self._streams.dial(peer_id, name), request, max_reply, patience)

    async def _ask(
        self, line: tuple[str, str], stream: Stream, request: bytes, max_reply: int, patience: float
    ) -> bytes:
        """Make one call over ``stream``, which is then kept if it can be used again, and closed if not."""
        try:
            await stream.write_frame(request)
            await stream.expect(patience)
            reply = await stream.read_frame(max_reply, STALL_SECONDS)
        except BaseException:
            stream.close()
            raise
        self._keep(line, stream)
        return reply

    def _keep(self, line: tuple[str, str], stream: Stream) -> None:
        if line in self._kept:
            stream.close()
            return

        def forget() -> None:
            del self._kept[line]
            stream.close()

        self._kept[line] = stream, asyncio.get_running_loop().call_later(KEPT_SECONDS, forget)

    def _idle(self, line: tuple[str, str]) -> Stream | None:
        """Return a stream that was kept, now the caller's; None where there is none."""
        if line not in self._kept:
            return None
        stream, timer = self._kept.pop(line)
        timer.cancel()
        return stream
