"""Catch up: bring a node that is behind, or whose state differs, to the state of the run.

A record says what its outer step takes, by hash, so that a node needs nobody's word: it takes the same steps as those
who were there. Only where that is more to fetch than the outer state itself, or cannot be had, is the state fetched;
first the one of now, and, for a line so slow that this changes before it is here, one that members keep on disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from psyche.config import Node
from psyche.diloco.replica import Replica
from psyche.exchange.base import Exchange, applied_blobs
from psyche.exchange.payload_store import PayloadStore
from psyche.ledger.chain_sync import CertifiedRecord, ChainFetcher, verified_successors
from psyche.ledger.writer import LedgerWriter
from psyche.network.transport import FetchError
from psyche.protocol.acceptor import Chain, plan_fault
from psyche.protocol.certificates import BadCertificate
from psyche.protocol.messages import Plan, Record, RunStatus
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog
from psyche.telemetry.formatting import plural, size
from psyche.worker.coordinator_client import RETRY_SECONDS, CoordinatorClient
from psyche.worker.node_state import NodeState
from psyche.worker.state_transfer import Arriving
from psyche.worker.voter import Voter

MAX_OWN_HISTORY = 1 << 30


class CatchUp:
    """One node's. ``exchange`` makes its part in the exchange of a plan's round."""

    def __init__(
        self,
        replica: Replica,
        settings: Node,
        payload_store: PayloadStore,
        *,
        voter: Voter,
        client: CoordinatorClient,
        state: NodeState,
        exchange: Callable[[Plan], Exchange],
        log: EventLog,
        warn: Callable[[str], None],
    ) -> None:
        self._replica, self._payload_store, self._voter, self._client = replica, payload_store, voter, client
        self._state, self._exchange, self._log, self._warn = state, exchange, log, warn
        self._chain_fetcher = ChainFetcher(replica.manifest, payload_store.network.rpc)
        self._replayed_at_most = settings.checkpoint_every * settings.checkpoints_kept
        """Rounds. Others keep what their steps took for about as long; of longer ones not even the records are asked
        for."""
        self._arriving: tuple[Arriving, Chain] | None = None
        """A state that has come in part, and where in the chain it stands."""

    async def recover(self, ledger: LedgerWriter) -> None:
        """Repeat the outer steps after the last checkpoint from this node's own disk."""
        began = self._replica.chain.rounds
        encoded = await ledger.certificates(began + 1, MAX_OWN_HISTORY)
        mine = await asyncio.to_thread(verified_successors, self._replica.manifest, encoded, self._replica.chain)
        try:
            for record, certificate in mine:
                if not all(root in self._payload_store.journal for root in applied_blobs(record)):
                    break
                if not await self._retake(record, certificate):
                    break
        except FetchError as error:  # the disk has spoilt it, and nobody else is there yet
            self._warn(f"not all outer steps after the last checkpoint can be repeated from this disk: {error}")
        if self._replica.chain.rounds > began:
            self._tell(began)

    async def synchronise(self, status: RunStatus) -> None:
        """Move to the state that ``status`` names, or closer to it."""
        chain = self._replica.chain
        if status.rounds == chain.rounds and chain.rounds:
            expected, found = status.state_root.hex(), chain.state_root.hex()
            self._log.emit(
                events.Diverged(peer=self._payload_store.peer_id, round=chain.rounds, expected=expected, found=found)
            )
        elif 0 < status.rounds - chain.rounds <= self._replayed_at_most and await self._replay(sparingly=True):
            return
        record = None
        if status.rounds:
            record = self._shown_by(status)
            if record is None or record.plan.round != status.rounds:
                await self._client.until(lambda new: new.version != status.version)
                return
        self._log.emit(events.PhaseChanged(round=status.rounds, phase="joining"))
        try:
            await self._fetch(record, status.state_root)
        except FetchError as error:
            try:  # most likely it has changed
                async with asyncio.timeout(RETRY_SECONDS):
                    await self._client.until(
                        lambda new: new.rounds > status.rounds and behind(new, self._replica.chain)
                    )
            except TimeoutError:
                self._warn(f"{error}; trying again")

    async def _replay(self, *, sparingly: bool) -> bool:
        """Take the outer steps of the rounds that this node lacks; whether it took any.

        ``sparingly``: unless the state itself would be less to fetch.
        """
        began = self._replica.chain.rounds
        others = await self._others()
        try:
            while missing := await self._chain_fetcher.fetch_after(self._replica.chain, others):
                if sparingly and self._bytes_of(missing) > self._replica.outer.tensor.nbytes:
                    break
                for record, certificate in missing:
                    if not await self._retake(record, certificate, others):
                        return False  # this node's state is not that of the run
        except FetchError as error:
            self._warn(f"not all missed outer steps can be taken: {error}")
        if self._replica.chain.rounds == began:
            return False
        self._tell(began)
        await self._client.send_hello()
        return True

    async def _retake(self, record: Record, certificate: bytes, others: Sequence[str] = ()) -> bool:
        """The outer step of a round that is over, unless it starts from another state than this node's.

        All members of the round may be gone: ``others`` took its outer step, too, and keep what it takes. Raises
        ``FetchError``.
        """
        if plan_fault(record.plan, self._replica.chain) is not None:
            return False
        exchange = self._exchange(record.plan)
        exchange.followers = others
        gradient = await exchange.outer_gradient(record)
        self._voter.certificate = certificate
        await self._state.apply(record, gradient)
        return True

    async def _fetch(self, record: Record | None, root: bytes) -> None:
        """Fetch and take over the outer state after ``record``, whose certificate was seen last.

        Raises ``FetchError``; what has come is taken along to the next attempt.
        """
        members = [] if record is None else [member.node for member in record.plan.members]
        holders = [*members, *await self._others()]
        goal = self._replica.chain_position(record, root)
        arriving = await self._taken_along(goal, holders)
        try:
            outer = await arriving.fetch(self._payload_store.network, root, holders)
        except FetchError:
            self._arriving = arriving, goal
            raise
        seconds = arriving.seconds
        await self._state.adopt(outer, record)
        self._log.emit(
            events.Resynchronised(
                round=goal.rounds,
                state_root=root.hex(),
                donor="the members",
                gave=tuple(arriving.gave.most_common()),
                seconds=seconds,
                moved=arriving.moved,
            )
        )
        await self._client.send_hello()

    async def _taken_along(self, goal: Chain, holders: list[str]) -> Arriving:
        """What an attempt before got, with the outer steps since then taken on it; nothing where they are more to
        fetch than that."""
        begun, self._arriving = self._arriving, None
        if begun is not None:
            arriving, at = begun
            try:
                if at.head == goal.head or await self._move(arriving, at, goal, holders):
                    return arriving
            except FetchError as error:
                self._warn(f"the outer steps since the state that was being fetched cannot be taken: {error}")
        return Arriving(self._replica.outer.theta.numel())

    async def _move(self, arriving: Arriving, at: Chain, goal: Chain, holders: list[str]) -> bool:
        """Take ``arriving`` from ``at`` to ``goal``, if that is worth it. Raises ``FetchError``."""
        told = await self._chain_fetcher.fetch_after(at, holders)
        missing = [(record, certificate) for record, certificate in told if record.plan.round <= goal.rounds]
        if not missing or missing[-1][0].hash != goal.head or self._bytes_of(missing) >= arriving.received:
            return False
        for record, _ in missing:
            exchange = self._exchange(record.plan)
            exchange.followers = holders
            gradient = await exchange.outer_gradient(record)
            await asyncio.to_thread(self._replica.outer_step, record.plan.round, gradient, arriving.outer)
        arriving.moved += len(missing)
        steps = plural(len(missing), "outer step")
        text = f"the state changed while it was fetched: {steps} taken on the {size(arriving.received)} that had come"
        self._log.emit(events.Notice(level="info", text=text))
        return True

    def _bytes_of(self, missing: list[CertifiedRecord]) -> int:
        """That the outer steps of ``missing`` take, and that are not on this disk, about."""
        there = self._payload_store.journal
        return sum(size for record, _ in missing for root, size in applied_blobs(record).items() if root not in there)

    async def _others(self) -> list[str]:
        """Whom to ask for what is past: those who are connected first."""
        return await self._payload_store.network.sources(self._replica.manifest.resolved.coordinators)

    def _shown_by(self, status: RunStatus) -> Record | None:
        """The last certified record, if the board proves it."""
        try:
            return None if status.certificate is None else self._voter.record_of(status.certificate)
        except BadCertificate as error:
            self._warn(f"invalid certificate from the coordinator: {error}")
            return None

    def _tell(self, began: int) -> None:
        now = self._replica.chain.rounds
        self._log.emit(events.CaughtUp(round=now, rounds=now - began))


def behind(status: RunStatus, chain: Chain) -> bool:
    """Return whether the run has certified a state that a node at ``chain`` does not hold."""
    known = status.state_root != bytes(32)  # a coordinator that starts again does not know it yet
    return known and status.rounds >= chain.rounds and status.state_root != chain.state_root
