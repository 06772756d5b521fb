"""A member's line to the coordinator that leads: it watches the board and submits signed messages.

Which of the run's coordinators that is, a member finds out by asking them in turn. It follows the latest term it has
heard of, promising to take part in nothing of an earlier one, and tells a new leader once more what it has done in the
round: the one before may have taken it along.
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
REPEATED = (Commitment.DOMAIN, Contribution.DOMAIN, Have.DOMAIN)
"""What is said once more to a new leader, in this order. Votes and reports belong to a term."""
PATIENCE_SECONDS = 600.0
"""How long a member keeps its work and waits for a coordinator that does not answer."""


class Follower(Protocol):
    """The node whose line this is."""

    @property
    def term(self) -> int:
        """Of the leader it follows."""
        ...

    def introduce(self) -> Hello:
        """What it says of itself."""
        ...

    async def promise(self, term: int, claim: bytes) -> Promise:
        """Follow the leader of ``term``, who signed ``claim``."""
        ...


class CoordinatorClient:
    """Keeps ``status`` up to date and lets a coroutine wait for it to say something."""

    def __init__(
        self,
        manifest: Manifest,
        identity: Identity,
        rpc: Rpc,
        node: Follower,
        warn: Callable[[str], None],
    ) -> None:
        self._manifest, self._identity, self._rpc = manifest, identity, rpc
        self._node, self._warn = node, warn
        self._coordinators = manifest.resolved.coordinators
        self._coordinator = self._coordinators[0]
        self._promised = 0
        """The term of the promise that this process has sent last."""
        self._repeat = 0
        """The round of which a new leader has to hear yet."""
        self._said: dict[str, tuple[int, bytes]] = {}
        """What was submitted last of each kind, and in which round."""
        self._left = False
        self._changed = asyncio.Condition()
        self.status: RunStatus | None = None

    async def watch(self) -> None:
        """Follow the board until cancelled, presenting this node whenever the coordinator does not know it.

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
                    await self._introduce()
                    if self._left:  # it will not be known any more, however often it asks
                        await asyncio.sleep(RETRY_SECONDS)
                if silent_since is not None:
                    self._warn("the coordinator is back")
                silent_since = None
            except (Unreachable, Refused, Violation, MalformedMessage, BadSignature, WrongContext) as error:
                self._ask_another()
                if silent_since is None:
                    silent_since = time.monotonic()
                    self._warn(
                        f"the coordinator cannot be reached ({error}); keeping the work and trying again "
                        f"for {PATIENCE_SECONDS / 60:.0f} minutes"
                    )
                elif time.monotonic() - silent_since > PATIENCE_SECONDS:
                    raise PsycheError(
                        f"no coordinator answered for {PATIENCE_SECONDS / 60:.0f} minutes; the work is in the last "
                        "checkpoint: run the same command again when the run is back"
                    ) from None
                await asyncio.sleep(RETRY_SECONDS)

    async def until(self, wanted: Callable[[RunStatus], bool]) -> RunStatus:
        """The first board for which ``wanted`` is true, now or later."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.status is not None and wanted(self.status))
            assert self.status is not None
            return self.status

    async def present(self) -> None:
        """Tell the coordinator that this node is here, and with which state; not once it has left."""
        if not self._left:
            body = self._node.introduce()
            await self.submit(body, body.rounds)

    async def leave(self, reason: str, round_number: int) -> None:
        """Say goodbye. What was begun may still be submitted, but this node does not come back."""
        self._left = True
        await self.submit(Leave(reason), round_number)

    async def submit(self, body: Body, round_number: int) -> None:
        """Sign and send, again and again while the coordinator is away. Raises ``Refused`` with its reason."""
        data = self._sealed(body, round_number)
        while True:
            try:
                await self._send(data)
                return
            except Refused as refusal:
                if refusal.code != RefusalCode.NOT_LEADING:
                    raise
                await asyncio.sleep(RETRY_SECONDS)
            except (Unreachable, Violation):
                await asyncio.sleep(RETRY_SECONDS)  # watch() tells people, asks another coordinator, gives up in time

    async def _introduce(self) -> None:
        """:meth:`present` for :meth:`watch`, which must not wait for a coordinator: only it asks another one."""
        if not self._left:
            body = self._node.introduce()
            await self._send(self._sealed(body, body.rounds))

    def _sealed(self, body: Body, round_number: int) -> bytes:
        data = encode_envelope(self._identity.seal(body.DOMAIN, self._manifest.run_id, round_number, body.encode()))
        if body.DOMAIN in REPEATED:
            self._said[body.DOMAIN] = round_number, data
        return data

    async def _send(self, data: bytes) -> None:
        """To the coordinator of now, once. Raises what :meth:`Rpc.call` does."""
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
        envelope = decode_envelope(data, MAX_STATUS)
        open_envelope(envelope, domain=RunStatus.DOMAIN, run_id=self._manifest.run_id)
        status = decode(RunStatus, envelope.body)
        if self._coordinators[status.term % len(self._coordinators)] != envelope.author:
            raise BadSignature(f"the board is signed by {envelope.author}, who does not lead in term {status.term}")
        if status.term < self._node.term:
            await self._introduce()  # so that it hears of the later one
            raise Refused(f"it leads in term {status.term}, and this node follows the leader of term {self._node.term}")
        if status.term > self._promised:
            await self._follow(status)
        if status.note and status.phase != Phase.FINISHED and status.note != (self.status.note if self.status else ""):
            self._warn(f"the coordinator says: {status.note}")
        if self._repeat and status.phase != Phase.ELECTING:
            await self._say_again(status)
        async with self._changed:
            self.status = status
            self._changed.notify_all()

    async def _say_again(self, status: RunStatus) -> None:
        """Tell a new leader that goes on with the round what the one before was told of it."""
        round_number = self._repeat
        for domain in REPEATED:
            said = self._said.get(domain)
            if said is None or status.plan is None or (said[0], status.plan.round) != (round_number, round_number):
                continue
            with contextlib.suppress(Refused):  # of an attempt that is over, say
                await self._send(said[1])
        self._repeat = 0

    async def _follow(self, status: RunStatus) -> None:
        """Promise the board's author to take part in nothing earlier; what was said in this round is repeated."""
        try:
            promise = await self._node.promise(status.term, status.claim)
        except Refusal as refusal:
            await self._introduce()  # so that it hears of a later term
            raise Refused(str(refusal)) from None
        await self._send(self._sealed(promise, promise.rounds))
        self._promised = status.term
        self._repeat = promise.rounds + 1

    def _ask_another(self) -> None:
        place = self._coordinators.index(self._coordinator)
        self._coordinator = self._coordinators[(place + 1) % len(self._coordinators)]
