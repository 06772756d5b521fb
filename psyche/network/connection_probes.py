"""Probes that every node answers, so that a newcomer learns whether its clock is right and its port can be reached.

Answers lead to warnings only. A peer's time sets nothing, and a peer dials nobody but the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from statistics import median

from psyche.network.transport import Network, Refused, Unreachable, Violation

ASKED = 8
"""Peers whose answers are compared."""
CALL_SECONDS = 6.0
DIAL_SECONDS = 3.0
DIALS_AT_ONCE = 4
_END = re.compile(r"/ip[46]/([^/]+)/(tcp|udp)/\d+(/quic-v1)?")


@dataclass(frozen=True)
class Offset:
    """This machine's clock relative to the median of its peers' clocks, in seconds, with the error and number of
    peers."""

    seconds: float
    error: float
    peers: int


async def serve_probes(network: Network) -> None:
    """Answer ``clock`` and ``reach``."""
    dials = asyncio.Semaphore(DIALS_AT_ONCE)

    async def clock(peer: str, request: bytes) -> bytes:
        return time.time_ns().to_bytes(8, "big")

    async def reach(peer: str, request: bytes) -> bytes:
        if dials.locked():
            raise Refused("too many ask at once")
        async with dials:
            return await _dial_back(network, peer, int.from_bytes(request, "big"))

    await network.rpc.serve("clock", clock, max_request=0)
    await network.rpc.serve("reach", reach, max_request=2)


async def clock_offset(network: Network, peers: Sequence[str]) -> Offset | None:
    """Compare this clock with the median of some peers', corrected for half the round trip; None if nobody answers.

    The median is right as long as most of the peers asked are honest.
    """

    async def ask(peer: str) -> tuple[float, float] | None:
        await _call(network, peer, "clock", b"", 8)  # opens the stream, which takes round trips of its own
        began = time.time()
        reply = await _call(network, peer, "clock", b"", 8)
        ended = time.time()
        if reply is None or len(reply) != 8:
            return None
        theirs = int.from_bytes(reply, "big") / 1e9
        return (began + ended) / 2 - theirs, (ended - began) / 2

    answers = [one for one in await asyncio.gather(*map(ask, peers[:ASKED])) if one is not None]
    if not answers:
        return None
    return Offset(median(one[0] for one in answers), median(one[1] for one in answers), len(answers))


async def reachable(network: Network, peers: Sequence[str], port: int) -> tuple[bool | None, str]:
    """Return whether a peer could open a TCP connection to ``port`` of this machine, and this machine's address as it
    is seen.

    None where no peer could tell: there is none, or all are reached through relays. Peers that see this machine at a
    public address are believed before those in the same local network, who pass no router.
    """
    request = port.to_bytes(2, "big")
    replies = await asyncio.gather(*(_call(network, peer, "reach", request, 64) for peer in peers[:ASKED]))
    answers = [answer for reply in replies if reply is not None and (answer := _answer(reply)) is not None]
    outside = [answer for answer in answers if ip_address(answer[1]).is_global]
    if not answers:
        return None, ""
    told = outside or answers
    return any(opened for opened, _ in told), told[0][1]


def _answer(reply: bytes) -> tuple[bool, str] | None:
    """Return what a peer says of ``reach``, if it makes sense."""
    with contextlib.suppress(ValueError):
        if reply[:1] in (b"\0", b"\1"):
            return reply[0] == 1, str(ip_address(reply[1:].decode()))
    return None


async def _dial_back(network: Network, peer: str, port: int) -> bytes:
    """u8 whether the caller's port answers, then the caller's address as this node sees it."""
    ends = (await network.connected()).get(peer, [])
    found = next((match for end in ends if (match := _END.fullmatch(end))), None)
    if found is None or port == 0:
        raise Refused("there is no direct connection to go by")
    host = found[1]
    opened = False
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(DIAL_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
            opened = True
    return bytes([opened]) + host.encode()


async def _call(network: Network, peer: str, name: str, request: bytes, limit: int) -> bytes | None:
    try:
        return await network.rpc.call(peer, name, request, timeout=CALL_SECONDS, max_reply=limit)
    except (Unreachable, Refused, Violation):
        return None
