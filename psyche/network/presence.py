"""Who is there: every node announces itself in the DHT, and newcomers look up whom to ask."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import msgspec

from psyche.network.address import MAX_ADDRESS, split_address
from psyche.network.node import NetworkNode
from psyche.network.records import MAX_BODY

KINDS = ("coordinator", "member")
TTL_SECONDS = 120.0
REPEAT_SECONDS = 40.0
MAX_ANNOUNCED = 8
"""Addresses in one announcement."""


async def announce(network: NetworkNode, kind: str) -> None:
    """Announce this node as ``kind``, and where it can be reached, until cancelled."""
    while True:
        with contextlib.suppress(TimeoutError):  # a daemon too busy to say: the next time is soon enough
            await network.discovery.announce(kind, encode_addresses(await network.addresses()), TTL_SECONDS)
        await asyncio.sleep(REPEAT_SECONDS)


async def sources(network: NetworkNode, first: tuple[str, ...]) -> list[str]:
    """PeerIDs to ask for anything content-addressed: ``first``, then all that the DHT knows of.

    Those that are connected come before those that would have to be dialled: an old invite may name many that are gone.
    """
    known = dict.fromkeys([*first, *sorted(await announced(network))])
    connected = await network.connected()
    return sorted((peer for peer in known if peer != network.peer_id), key=lambda peer: peer not in connected)


async def announced(network: NetworkNode) -> dict[str, tuple[str, ...]]:
    """PeerID -> addresses (with it at their ends) of all that announce themselves now, this node too."""
    found: dict[str, tuple[str, ...]] = {}
    for bodies in await asyncio.gather(*map(network.discovery.lookup, KINDS)):
        for peer_id, body in bodies.items():
            found[peer_id] = decode_addresses(peer_id, body)
    return found


def encode_addresses(addresses: Sequence[str]) -> bytes:
    """The body of an announcement: as many of ``addresses`` as fit, without the PeerID that signs it."""
    transports = [split_address(text)[0] for text in addresses[:MAX_ANNOUNCED]]
    while len(body := msgspec.msgpack.encode(transports)) > MAX_BODY:
        transports.pop()
    return body


def decode_addresses(peer_id: str, body: bytes) -> tuple[str, ...]:
    """What ``peer_id`` announced (at most MAX_BODY bytes); an address that is not valid is left out.

    A peer can only announce addresses of itself: whoever dials one asks for its PeerID there.
    """
    try:
        transports = msgspec.msgpack.decode(body, type=list[str])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return ()
    good = []
    for transport in transports[:MAX_ANNOUNCED]:
        text = f"{transport}/p2p/{peer_id}"
        with contextlib.suppress(ValueError):
            if len(text) <= MAX_ADDRESS and split_address(text):
                good.append(text)
    return tuple(good)
