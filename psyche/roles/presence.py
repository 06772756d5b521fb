"""Who is there: every node announces itself in the DHT, and newcomers look up whom to ask."""

from __future__ import annotations

import asyncio

from psyche.network.node import NetworkNode

KINDS = ("coordinator", "member")
TTL_SECONDS = 120.0
REPEAT_SECONDS = 40.0


async def announce(network: NetworkNode, kind: str) -> None:
    """Announce this node as ``kind`` until cancelled."""
    while True:
        await network.discovery.announce(kind, b"", TTL_SECONDS)
        await asyncio.sleep(REPEAT_SECONDS)


async def sources(network: NetworkNode, first: tuple[str, ...]) -> list[str]:
    """PeerIDs to ask for anything content-addressed: ``first``, then all that the DHT knows of."""
    found = [await network.discovery.lookup(kind) for kind in KINDS]
    known = [*first, *(peer for peers in found for peer in sorted(peers))]
    return [peer for peer in dict.fromkeys(known) if peer != network.peer_id]
