"""A member's line to the coordinator: it watches the board and submits signed messages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from psyche.config import Manifest
from psyche.errors import PsycheError
from psyche.network.identity import BadSignature, Identity, WrongContext, open_envelope
from psyche.network.rpc import Rpc
from psyche.network.streams import Refused, Unreachable, Violation
from psyche.protocol import envelope as envelopes
from psyche.protocol.envelope import MalformedMessage
from psyche.protocol.messages import Board, Body, Present, decode
from psyche.protocol.state import Phase
from psyche.roles.coordinator import MAX_BOARD, UNKNOWN, WATCH_SECONDS

CALL_SECONDS = 15.0
RETRY_SECONDS = 1.0
PATIENCE_SECONDS = 600.0
"""How long a member keeps its work and waits for a coordinator that does not answer."""


class BoardClient:
    """Keeps ``board`` up to date and lets a coroutine wait for it to say something."""

    def __init__(
        self,
        manifest: Manifest,
        identity: Identity,
        rpc: Rpc,
        present: Callable[[], Present],
        warn: Callable[[str], None],
    ) -> None:
        self._manifest, self._identity, self._rpc = manifest, identity, rpc
        self._present, self._warn = present, warn
        self._coordinator = manifest.resolved.coordinators[0]
        self._changed = asyncio.Condition()
        self.board: Board | None = None

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
                    if str(refusal) != UNKNOWN:
                        raise
                    await self.present()
                if silent_since is not None:
                    self._warn("the coordinator is back")
                silent_since = None
            except (Unreachable, Refused, Violation, MalformedMessage, BadSignature, WrongContext) as error:
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

    async def until(self, wanted: Callable[[Board], bool]) -> Board:
        """The first board for which ``wanted`` is true, now or later."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.board is not None and wanted(self.board))
            assert self.board is not None
            return self.board

    async def present(self) -> None:
        """Tell the coordinator that this node is here, and with which state."""
        body = self._present()
        await self.submit(body, body.rounds)

    async def submit(self, body: Body, round: int) -> None:
        """Sign and send, again and again while the coordinator is away. Raises ``Refused`` with its reason."""
        sealed = self._identity.seal(body.DOMAIN, self._manifest.run_id, round, body.encode())
        data = envelopes.encode(sealed)
        while True:
            try:
                await self._rpc.call(self._coordinator, "submit", data, timeout=CALL_SECONDS, max_reply=64)
                return
            except (Unreachable, Violation):
                await asyncio.sleep(RETRY_SECONDS)  # watch() tells people, and gives up in time

    async def _refresh(self) -> None:
        seen = self.board.version if self.board else 0
        data = await self._rpc.call(
            self._coordinator,
            "watch",
            seen.to_bytes(8, "little"),
            timeout=WATCH_SECONDS + CALL_SECONDS,
            max_reply=MAX_BOARD,
        )
        envelope = envelopes.decode(data, MAX_BOARD)
        open_envelope(envelope, domain=Board.DOMAIN, run_id=self._manifest.run_id)
        if envelope.author not in self._manifest.resolved.coordinators:
            raise BadSignature(f"the board is signed by {envelope.author}, who is no coordinator of this run")
        board = decode(Board, envelope.body)
        if board.note and board.phase != Phase.FINISHED and board.note != (self.board.note if self.board else ""):
            self._warn(f"the coordinator says: {board.note}")
        async with self._changed:
            self.board = board
            self._changed.notify_all()
