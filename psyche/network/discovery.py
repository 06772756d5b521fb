"""Who is in the run, and where: small signed announcements in the DHT."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

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
from psyche.protocol.envelope import MalformedMessage


class Discovery:
    """Announce oneself, and look up those who did. Every announcement found is signed by the PeerID it is under."""

    def __init__(self, dht: Any, identity: Identity, run_id: bytes, kinds: Sequence[str]) -> None:
        self._dht, self._identity, self._run_id, self._kinds = dht, identity, run_id, tuple(kinds)

    async def announce(self, kind: str, body: bytes, ttl: float) -> bool:
        """Tell whoever looks up ``kind``, for ``ttl`` seconds, replacing what we said before.

        ``body`` has at most MAX_BODY bytes. False if no node stored it; repeat well before ``ttl`` is over.
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

    def _check(self, kind: str) -> None:
        if kind not in self._kinds:
            raise ValueError(f"announcements of kind {kind!r} were not declared; there are {', '.join(self._kinds)}")
