"""A member's connection to the leading coordinator: follow its status, submit signed messages.

A member finds the leader by asking the run's coordinators in turn. It follows the latest term it has heard of,
promises to take part in no earlier one, and sends a new leader its messages of the round again: they may be lost with
the old one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Protocol

from psyche.config import Manifest
from psyche.errors import PsycheError
from psyche.network.identity import BadSignature, Identity, WrongContext, open_envelope
from psyche.network.rpc import Rpc
from psyche.network.transport import Refused, Unreachable, Violation
from psyche.protocol.acceptor import Refusal
from psyche.protocol.messages import Commitment, Contribution, Have, Hello, Leave, Promise, RunStatus
from psyche.protocol.round_state import Phase
from psyche.protocol.wire import (
    MAX_STATUS,
    WATCH_SECONDS,
    Body,
    MalformedMessage,
    RefusalCode,
    decode,
    decode_envelope,
    encode_envelope,
)

CALL_SECONDS = 15.0
RETRY_SECONDS = 1.0
RESENT = (Commitment.DOMAIN, Contribution.DOMAIN, Have.DOMAIN)
"""Messages that a new leader gets again, in this order. Votes and reports belong to one term."""
PATIENCE_SECONDS = 600.0
"""How long a member keeps its work while no coordinator answers."""


class Member(Protocol):
    """What the client needs from its node."""

    @property
    def term(self) -> int:
        """The term of the leader it follows."""
        ...

    def hello(self) -> Hello:
        """Return the message that introduces the node."""
        ...

    async def promise(self, term: int, claim: bytes) -> Promise:
        """Follow the leader of ``term``, who signed ``claim``."""
        ...


class CoordinatorClient:
    """Keeps ``status`` up to date, and lets coroutines wait for a status."""

    def __init__(
        self,
        manifest: Manifest,
        identity: Identity,
        rpc: Rpc,
        node: Member,
        warn: Callable[[str], None],
    ) -> None:
        self._manifest, self._identity, self._rpc = manifest, identity, rpc
        self._node, self._warn = node, warn
        self._coordinators = manifest.resolved.coordinators
        self._coordinator = self._coordinators[0]
        self._promised = 0
        """The term of the last promise that this process sent."""
        self._repeat = 0
        """The round whose messages a new leader has not yet received; 0: none."""
        self._last_sent: dict[str, tuple[int, bytes]] = {}
        """The last message of each kind, and its round."""
        self._left = False
        self._contact_since = self._last_contact = time.monotonic()
        self._changed = asyncio.Condition()
        self.status: RunStatus | None = None

    async def watch(self) -> None:
        """Follow the run's status until cancelled; send Hello whenever the coordinator does not know this node.

        Raises :class:`PsycheError` after ``PATIENCE_SECONDS`` of silence.
        """
        silent_since: float | None = None
        while True:
            try:
                try:
                    await self._refresh()
                except Refused as refusal:
                    if refusal.code != RefusalCode.UNKNOWN_PEER:
                        raise
                    await self._try_hello()
                    if self._left:  # a node that has left stays unknown
                        await asyncio.sleep(RETRY_SECONDS)
                if silent_since is not None:
                    self._warn("the coordinator answers again")
                silent_since = None
            except (Unreachable, Refused, Violation, MalformedMessage, BadSignature, WrongContext) as error:
                self._next_coordinator()
                if silent_since is None:
                    silent_since = time.monotonic()
                    self._warn(
                        f"no coordinator can be reached ({error}); this node keeps its work and retries "
                        f"for {PATIENCE_SECONDS / 60:.0f} minutes"
                    )
                elif time.monotonic() - silent_since > PATIENCE_SECONDS:
                    raise PsycheError(
                        f"no coordinator answered for {PATIENCE_SECONDS / 60:.0f} minutes; the work is in the last "
                        "checkpoint: run the same command to rejoin when a coordinator is back"
                    ) from None
                await asyncio.sleep(RETRY_SECONDS)

    @property
    def contact_seconds(self) -> float:
        """How long a coordinator has heard from this node without a gap longer than ``silence``."""
        return self._last_contact - self._contact_since

    async def until(self, wanted: Callable[[RunStatus], bool]) -> RunStatus:
        """Wait for a status for which ``wanted`` is true, and return it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.status is not None and wanted(self.status))
            assert self.status is not None
            return self.status

    async def send_hello(self) -> None:
        """Introduce this node and its state to the coordinator, unless it has left."""
        if not self._left:
            body = self._node.hello()
            await self.submit(body, body.rounds)

    async def leave(self, reason: str, round_number: int) -> None:
        """Leave the run. Messages of the round may still be submitted, but the node does not rejoin."""
        self._left = True
        await self.submit(Leave(reason), round_number)

    async def submit(self, body: Body, round_number: int) -> None:
        """Sign and send a message; retry while the coordinator is unreachable. Raises ``Refused``."""
        data = self._sign(body, round_number)
        while True:
            try:
                await self._send(data)
                return
            except Refused as refusal:
                if refusal.code != RefusalCode.NOT_LEADING:
                    raise
                await asyncio.sleep(RETRY_SECONDS)
            except (Unreachable, Violation):
                await asyncio.sleep(RETRY_SECONDS)  # watch() warns, tries another coordinator, and gives up in time

    async def _try_hello(self) -> None:
        """Send Hello without waiting for a coordinator, for :meth:`watch`: only ``watch`` moves to another one."""
        if not self._left:
            body = self._node.hello()
            await self._send(self._sign(body, body.rounds))

    def _sign(self, body: Body, round_number: int) -> bytes:
        data = encode_envelope(self._identity.seal(body.DOMAIN, self._manifest.run_id, round_number, body.encode()))
        if body.DOMAIN in RESENT:
            self._last_sent[body.DOMAIN] = round_number, data
        return data

    async def _send(self, data: bytes) -> None:
        """Send to the current coordinator, once. Raises what :meth:`Rpc.call` does."""
        await self._rpc.call(self._coordinator, "submit", data, timeout=CALL_SECONDS, max_reply=64)

    async def _refresh(self) -> None:
        seen = self.status.version if self.status and self.status.term == self._promised else 0
        data = await self._rpc.call(
            self._coordinator,
            "watch",
            seen.to_bytes(8, "little"),
            timeout=WATCH_SECONDS + CALL_SECONDS,
            max_reply=MAX_STATUS,
        )
        now = time.monotonic()
        if now - self._last_contact > self._manifest.run.deadlines.silence:
            self._contact_since = now
        self._last_contact = now
        envelope = decode_envelope(data, MAX_STATUS)
        open_envelope(envelope, domain=RunStatus.DOMAIN, run_id=self._manifest.run_id)
        status = decode(RunStatus, envelope.body)
        if self._coordinators[status.term % len(self._coordinators)] != envelope.author:
            raise BadSignature(f"the status is signed by {envelope.author}, who does not lead in term {status.term}")
        if status.term < self._node.term:
            await self._try_hello()  # it then learns of the later one
            raise Refused(f"it leads in term {status.term}, and this node follows the leader of term {self._node.term}")
        if status.term > self._promised:
            await self._follow(status)
        if status.note and status.phase != Phase.FINISHED and status.note != (self.status.note if self.status else ""):
            self._warn(f"the coordinator says: {status.note}")
        if self._repeat and status.phase != Phase.ELECTING:
            await self._resend(status)
        async with self._changed:
            self.status = status
            self._changed.notify_all()

    async def _resend(self, status: RunStatus) -> None:
        """Send this round's messages again to a new leader that continues the round."""
        round_number = self._repeat
        for domain in RESENT:
            said = self._last_sent.get(domain)
            if said is None or status.plan is None or (said[0], status.plan.round) != (round_number, round_number):
                continue
            with contextlib.suppress(Refused):  # for example, of an attempt that has ended
                await self._send(said[1])
        self._repeat = 0

    async def _follow(self, status: RunStatus) -> None:
        """Promise the status's author to take part in no earlier term; this round's messages will be sent again."""
        try:
            promise = await self._node.promise(status.term, status.claim)
        except Refusal as refusal:
            await self._try_hello()  # it then learns of a later term
            raise Refused(str(refusal)) from None
        await self._send(self._sign(promise, promise.rounds))
        self._promised = status.term
        self._repeat = promise.rounds + 1

    def _next_coordinator(self) -> None:
        place = self._coordinators.index(self._coordinator)
        self._coordinator = self._coordinators[(place + 1) % len(self._coordinators)]
