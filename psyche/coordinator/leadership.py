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
from psyche.network.transport import Refused, Unreachable, Violation
from psyche.protocol.messages import Heartbeat, Proposal
from psyche.protocol.wire import MalformedMessage, decode, decode_envelope, encode_envelope
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog

ASKS_A_LEASE = 4
MAX_HEARTBEAT = 64


class Leadership:
    """One coordinator's view of who leads."""

    def __init__(self, manifest: Manifest, identity: Identity, rpc: Rpc) -> None:
        coordinators = manifest.resolved.coordinators
        self._others = [peer for peer in coordinators if peer != identity.peer_id]
        self._place = coordinators.index(identity.peer_id)
        self._manifest, self._identity, self._rpc = manifest, identity, rpc
        self._lease = manifest.run.deadlines.lease
        self._asking: asyncio.Task[None] | None = None
        self._led = time.monotonic()
        """When a leader was last heard of; before that, when this coordinator came."""
        self.later = 0
        """The highest term that anybody follows, as far as is known here."""
        self.rival = 0
        """The highest term of another coordinator that a member is known to follow."""
        self.finished = False
        """Whether another has seen the run's end."""
        self._own: Callable[[], Heartbeat] = lambda: Heartbeat(0, 0)

    async def serve(self, own: Callable[[], Heartbeat]) -> None:
        """Exchange words with the others: each that asks says its own, and hears ``own()``."""
        self._own = own

        async def answer(peer: str, request: bytes) -> bytes:
            if peer not in self._others:
                raise Refused("only the run's coordinators ask each other who leads")
            try:
                self._heard(decode(Heartbeat, request))
            except MalformedMessage as error:
                raise Refused(str(error)) from None
            return own().encode()

        await self._rpc.serve("heartbeat", answer, max_request=MAX_HEARTBEAT)

    def claim(self, term: int) -> bytes:
        """This coordinator's word that it leads in ``term``, for members to pass on."""
        beat = Heartbeat(term, term)
        return encode_envelope(self._identity.seal(beat.DOMAIN, self._manifest.run_id, 0, beat.encode()))

    def hear(self, claim: bytes | None) -> None:
        """A member took part in something of ``claim``'s term. Raises like ``open_envelope`` where no coordinator did.

        Only what a coordinator signed counts: a member's own word must not cost anybody the lead. Raising terms does
        not win back a member that has promised itself to another's: it has to be asked for a new promise.
        """
        if claim is None:
            return
        envelope = decode_envelope(claim)
        open_envelope(envelope, domain=envelope.domain, run_id=self._manifest.run_id)
        if envelope.author not in self._manifest.resolved.coordinators:
            raise BadSignature(f"{envelope.author} is no coordinator of this run")
        term = 0
        if envelope.domain == Heartbeat.DOMAIN:
            term = decode(Heartbeat, envelope.body).term
        elif envelope.domain == Proposal.DOMAIN:
            term = decode(Proposal, envelope.body).term
        self.later = max(self.later, term)
        if envelope.author != self._identity.peer_id:
            self.rival = max(self.rival, term)

    async def turn(self, log: EventLog) -> bool:
        """Wait until it is this coordinator's turn; False where the run has ended meanwhile.

        Who led, and had to stop because members had taken part in a later term, is not made to wait again unless
        somebody leads in that term.
        """
        patience = self._lease * (1 + self._place / ASKS_A_LEASE) if self._others else 0.0
        if self._asking is None:
            if self._place == 0:
                self._led -= patience  # first on the list, it has nobody to wait for; but it asks
            await self.ask_all()
            self._asking = asyncio.create_task(self._ask_on())
        said = False
        while not self.finished and (left := self._led + patience - time.monotonic()) > 0:
            if not said:
                text = f"standing by: another coordinator leads; takes over after {patience:.0f} s without one"
                log.emit(events.Notice(level="info", text=text))
                said = True
            await asyncio.sleep(min(left, self._lease / ASKS_A_LEASE))
        return not self.finished

    async def _ask_on(self) -> None:
        while True:
            await asyncio.sleep(self._lease / ASKS_A_LEASE)
            await self.ask_all()

    async def ask_all(self) -> None:
        """Tell all that can be reached, and hear them."""
        await asyncio.gather(*(self._ask(peer) for peer in self._others))

    def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()

    async def _ask(self, peer: str) -> None:
        with contextlib.suppress(Unreachable, Refused, Violation, MalformedMessage, TimeoutError):
            beat = self._own().encode()
            reply = await self._rpc.call(peer, "heartbeat", beat, timeout=self._lease / 2, max_reply=MAX_HEARTBEAT)
            self._heard(decode(Heartbeat, reply))

    def _heard(self, beat: Heartbeat) -> None:
        self.later = max(self.later, beat.latest)
        self.finished |= beat.finished
        if beat.term:
            self._led = time.monotonic()
