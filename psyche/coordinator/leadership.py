"""When a coordinator begins to lead: while no other does. This is a heuristic; two leaders at once are safe.

Coordinators exchange heartbeats. One that hears of no leader for the length of a lease begins to lead, the first in the
manifest first; one that hears of a later term than its own stops.
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
        """When a leader was last heard of; initially, when this coordinator started."""
        self.later = 0
        """The highest term known to be in use."""
        self.rival = 0
        """The highest term of another coordinator that a member is known to follow."""
        self.finished = False
        """Whether another coordinator has seen the end of the run."""
        self._own: Callable[[], Heartbeat] = lambda: Heartbeat(0, 0)

    async def serve(self, own: Callable[[], Heartbeat]) -> None:
        """Answer heartbeats of the other coordinators with ``own()``."""
        self._own = own

        async def answer(peer: str, request: bytes) -> bytes:
            if peer not in self._others:
                raise Refused("only coordinators of this run may send heartbeats")
            try:
                self._note_heartbeat(decode(Heartbeat, request))
            except MalformedMessage as error:
                raise Refused(str(error)) from None
            return own().encode()

        await self._rpc.serve("heartbeat", answer, max_request=MAX_HEARTBEAT)

    def claim(self, term: int) -> bytes:
        """Return a signed heartbeat for ``term``, which members pass on as proof that this coordinator leads."""
        beat = Heartbeat(term, term)
        return encode_envelope(self._identity.seal(beat.DOMAIN, self._manifest.run_id, 0, beat.encode()))

    def observe_claim(self, claim: bytes | None) -> None:
        """Note the term of a coordinator's signed ``claim`` that a member passes on. Raises as ``open_envelope`` does.

        Only a coordinator's signature counts: a member alone must not end a leadership. A higher term does not win back
        a member that follows another leader; it has to be asked for a new promise.
        """
        if claim is None:
            return
        envelope = decode_envelope(claim)
        open_envelope(envelope, domain=envelope.domain, run_id=self._manifest.run_id)
        if envelope.author not in self._manifest.resolved.coordinators:
            raise BadSignature(f"{envelope.author} is not a coordinator of this run")
        term = 0
        if envelope.domain == Heartbeat.DOMAIN:
            term = decode(Heartbeat, envelope.body).term
        elif envelope.domain == Proposal.DOMAIN:
            term = decode(Proposal, envelope.body).term
        self.later = max(self.later, term)
        if envelope.author != self._identity.peer_id:
            self.rival = max(self.rival, term)

    async def turn(self, log: EventLog) -> bool:
        """Wait until it is this coordinator's turn to lead; return False if the run has ended meanwhile.

        A coordinator that had to stop leading because of a later term waits again only if another leads in that term.
        """
        patience = self._lease * (1 + self._place / ASKS_A_LEASE) if self._others else 0.0
        if self._asking is None:
            if self._place == 0:
                self._led -= patience  # the first coordinator waits for nobody, but asks
            await self.ask_all()
            self._asking = asyncio.create_task(self._ask_on())
        said = False
        while not self.finished and (left := self._led + patience - time.monotonic()) > 0:
            if not said:
                text = f"standing by; takes over after {patience:.0f} s without a leading coordinator"
                log.emit(events.Notice(level="info", text=text))
                said = True
            await asyncio.sleep(min(left, self._lease / ASKS_A_LEASE))
        return not self.finished

    async def _ask_on(self) -> None:
        while True:
            await asyncio.sleep(self._lease / ASKS_A_LEASE)
            await self.ask_all()

    async def ask_all(self) -> None:
        """Exchange heartbeats with all coordinators that can be reached."""
        await asyncio.gather(*(self._ask(peer) for peer in self._others))

    def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()

    async def _ask(self, peer: str) -> None:
        with contextlib.suppress(Unreachable, Refused, Violation, MalformedMessage, TimeoutError):
            beat = self._own().encode()
            reply = await self._rpc.call(peer, "heartbeat", beat, timeout=self._lease / 2, max_reply=MAX_HEARTBEAT)
            self._note_heartbeat(decode(Heartbeat, reply))

    def _note_heartbeat(self, beat: Heartbeat) -> None:
        self.later = max(self.later, beat.latest)
        self.finished |= beat.finished
        if beat.term:
            self._led = time.monotonic()
