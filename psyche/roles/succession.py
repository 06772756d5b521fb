"""When a coordinator begins to lead: while no other does. Only a heuristic; that two lead at once harms nothing.

Coordinators ask each other whether they lead. One that hears of no leader for the length of a lease begins, the first
on the manifest's list first; one that hears of a later term than its own stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from psyche.config import Manifest
from psyche.network.identity import BadSignature, Identity, open_envelope
from psyche.network.rpc import Rpc
from psyche.network.streams import Refused, Unreachable, Violation
from psyche.protocol import envelope as envelopes
from psyche.protocol.envelope import MalformedMessage
from psyche.protocol.messages import Heartbeat, Proposal, decode
from psyche.telemetry import events
from psyche.telemetry.events import EventLog

ASKS_A_LEASE = 4


class Succession:
    """One coordinator's view of who leads."""

    def __init__(self, manifest: Manifest, identity: Identity, rpc: Rpc) -> None:
        coordinators = manifest.resolved.coordinators
        self._others = [peer for peer in coordinators if peer != identity.peer_id]
        self._place = coordinators.index(identity.peer_id)
        self._manifest, self._identity, self._rpc = manifest, identity, rpc
        self._lease = manifest.run.deadlines.lease
        self._asking: asyncio.Task[None] | None = None
        self._led = time.monotonic()
        """When a leader was last heard of."""
        self.later = 0
        """The highest term that anybody follows, as far as is known here."""

    async def serve(self, own: Callable[[], tuple[int, int]]) -> None:
        """Tell the others ``own()``: the term this coordinator leads in, or 0, and the highest it has used."""

        async def answer(peer: str, request: bytes) -> bytes:
            if peer not in self._others:
                raise Refused("only the run's coordinators ask each other who leads")
            leading, latest = own()
            return Heartbeat(leading, max(latest, self.later)).encode()

        await self._rpc.serve("heartbeat", answer, max_request=16)

    def claim(self, term: int) -> bytes:
        """This coordinator's word that it leads in ``term``, for members to pass on."""
        beat = Heartbeat(term, term)
        return envelopes.encode(self._identity.seal(beat.DOMAIN, self._manifest.run_id, 0, beat.encode()))

    def hear(self, claim: bytes | None) -> None:
        """A member took part in something of ``claim``'s term. Raises like ``open_envelope`` where no coordinator did.

        Only what a coordinator signed counts: a member's own word must not cost anybody the lead.
        """
        if claim is None:
            return
        envelope = envelopes.decode(claim)
        open_envelope(envelope, domain=envelope.domain, run_id=self._manifest.run_id)
        if envelope.author not in self._manifest.resolved.coordinators:
            raise BadSignature(f"{envelope.author} is no coordinator of this run")
        if envelope.domain == Heartbeat.DOMAIN:
            self.later = max(self.later, decode(Heartbeat, envelope.body).term)
        elif envelope.domain == Proposal.DOMAIN:
            self.later = max(self.later, decode(Proposal, envelope.body).term)

    async def turn(self, log: EventLog) -> int:
        """Wait until it is this coordinator's turn; the highest term heard of."""
        if self._asking is None and self._others:
            self._asking = asyncio.create_task(self._ask_on())
        patience = self._lease * (1 + self._place / 2) if self._others else 0.0
        if self._place and self._others:
            log.emit(events.Notice(level="info", text=f"standing by, for {patience:.0f} s without a leader"))
            self._led = time.monotonic()
        elif self._others:
            self._led = time.monotonic() - patience  # first on the list; but it asks, once
            await self._ask_all()
        while (left := self._led + patience - time.monotonic()) > 0:  # noqa: ASYNC110 (what it waits for is silence)
            await asyncio.sleep(left)
        return self.later

    async def _ask_on(self) -> None:
        while True:
            await self._ask_all()
            await asyncio.sleep(self._lease / ASKS_A_LEASE)

    async def _ask_all(self) -> None:
        await asyncio.gather(*(self._ask(peer) for peer in self._others))

    async def _ask(self, peer: str) -> None:
        with contextlib.suppress(Unreachable, Refused, Violation, MalformedMessage, TimeoutError):
            reply = await self._rpc.call(peer, "heartbeat", b"", timeout=self._lease / 2, max_reply=64)
            beat = decode(Heartbeat, reply)
            self.later = max(self.later, beat.latest)
            if beat.term:
                self._led = time.monotonic()
