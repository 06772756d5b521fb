"""Discovery: small signed announcements in the DHT that say which nodes take part in a run and where to dial them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from psyche.network.address import MAX_ADDRESS, split_address
from psyche.network.identity import BadSignature, Identity, WrongContext
from psyche.network.records import (
    CLOCK_SKEW,
    MAX_BODY,
    MAX_TTL,
    Announcement,
    open_record,
    record_key,
    sign_record,
)
from psyche.protocol.wire import MalformedMessage

KINDS = ("coordinator", "member")
TTL_SECONDS = 120.0
REPEAT_SECONDS = 40.0
MAX_ANNOUNCED = 8
"""Addresses in one announcement."""


class Discovery:
    """Announces this node and looks up others. Every announcement found is signed by the PeerID it is stored under."""

    def __init__(self, dht: Any, identity: Identity, run_id: bytes, kinds: Sequence[str]) -> None:
        self._dht, self._identity, self._run_id, self._kinds = dht, identity, run_id, tuple(kinds)

    async def announce(self, kind: str, body: bytes, ttl: float) -> bool:
        """Publish ``body`` (at most MAX_BODY bytes) under ``kind`` for ``ttl`` seconds, replacing the previous one.

        Returns False if no node stored it. Repeat well before ``ttl`` is over.
        """
        self._check(kind)
        if len(body) > MAX_BODY or not 0 < ttl <= MAX_TTL:
            raise ValueError(f"an announcement has at most {MAX_BODY} bytes and lives at most {MAX_TTL:.0f} s")
        announcement = Announcement(kind, int((time.time() + ttl) * 1000), body)
        value = sign_record(self._identity, self._run_id, announcement)
        stored = await self._dht.store(
            record_key(self._run_id, kind),
            value,
            expiration_time=announcement.expires_ms / 1000,
            subkey=self._identity.peer_id,
        )
        return bool(stored)

    async def lookup(self, kind: str) -> dict[str, bytes]:
        """PeerID -> body of every live announcement of ``kind`` that can be found now, our own included."""
        self._check(kind)
        found = await self._dht.get(record_key(self._run_id, kind), latest=True)
        latest = time.time() + MAX_TTL + CLOCK_SKEW
        announced = {}
        for subkey, (value, expires) in found.value.items() if found is not None else ():
            try:
                author, announcement = open_record(self._run_id, value)
            except (MalformedMessage, WrongContext, BadSignature):
                continue
            if author == subkey and announcement.kind == kind and time.time() < expires <= latest:
                announced[author] = announcement.body
        return announced

    async def announced(self) -> dict[str, tuple[str, ...]]:
        """PeerID -> addresses (each ending in ``/p2p/<PeerID>``) of every node announced now, this one included."""
        found: dict[str, tuple[str, ...]] = {}
        for bodies in await asyncio.gather(*map(self.lookup, KINDS)):
            for peer_id, body in bodies.items():
                found[peer_id] = decode_addresses(peer_id, body)
        return found

    def _check(self, kind: str) -> None:
        if kind not in self._kinds:
            raise ValueError(f"announcements of kind {kind!r} were not declared; declared are {', '.join(self._kinds)}")


def encode_addresses(addresses: Sequence[str]) -> bytes:
    """Return the body of an announcement: as many of ``addresses`` as fit, without the PeerID that signs it."""
    transports = [split_address(text)[0] for text in addresses[:MAX_ANNOUNCED]]
    while len(body := msgspec.msgpack.encode(transports)) > MAX_BODY:
        transports.pop()
    return body


def decode_addresses(peer_id: str, body: bytes) -> tuple[str, ...]:
    """Return the addresses that ``peer_id`` announced (at most MAX_BODY bytes), without those that are malformed.

    A peer can only announce addresses of its own: a caller that dials one expects its PeerID there.
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
