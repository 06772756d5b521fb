"""Catch up: bring a node that is behind, or whose state differs, to the state of the run.

A certified record names the inputs of its outer step by hash, so a node that missed rounds repeats their outer steps
without trusting anyone. It fetches the outer state itself only if that is less to fetch, or if a payload is gone.
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
from psyche.network.identity import open_envelope
from psyche.network.transport import FetchError
from psyche.protocol.acceptor import Chain, plan_fault
from psyche.protocol.certificates import BadCertificate, attests_state
from psyche.protocol.messages import Plan, Record, RunStatus
from psyche.protocol.takeover import MINORITY_SILENCES
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog
from psyche.telemetry.formatting import plural, size
from psyche.worker.coordinator_client import RETRY_SECONDS, CoordinatorClient
from psyche.worker.node_state import NodeState
from psyche.worker.state_transfer import PartialState
from psyche.worker.voter import Voter

MAX_OWN_HISTORY = 1 << 30


class CatchUp:
    """Brings one node up to date. ``exchange`` returns this node's side of the exchange of a plan's round."""

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
        """Rounds that other members keep payloads for, about. A node that missed more fetches the state at once."""
        self._patience = MINORITY_SILENCES * replica.run.deadlines.silence
        self._partial: tuple[PartialState, Chain] | None = None
        """A partly fetched state, and its position in the chain."""

    async def recover(self, ledger: LedgerWriter) -> None:
        """Repeat the outer steps after the last checkpoint from this node's own disk."""
        began = self._replica.chain.rounds
        encoded = await ledger.certificates(began + 1, MAX_OWN_HISTORY)
        mine = await asyncio.to_thread(verified_successors, self._replica.manifest, encoded, self._replica.chain)
        try:
            for record, certificate in mine:
                if not all(root in self._payload_store.journal for root in applied_blobs(record)):
                    break
                if not await self._repeat_outer_step(record, certificate):
                    break
        except FetchError as error:  # corrupt on this disk, and no other member is connected yet
            self._warn(f"cannot repeat all outer steps since the last checkpoint from this disk: {error}")
        if self._replica.chain.rounds > began:
            self._log_caught_up(began)

    async def synchronise(self, status: RunStatus) -> None:
        """Move to the state that ``status`` names, or closer to it."""
        chain = self._replica.chain
        if status.rounds == chain.rounds and chain.rounds and not self._is_attested(status):
            self._warn(
                f"the coordinator names another state after round {status.rounds} than this node computed, without "
                "attestations by half of the voting weight: this node keeps its own"
            )
            await self._client.until(lambda new: new.version != status.version)
            return
        if status.rounds == chain.rounds and chain.rounds:
            expected, found = status.state_root.hex(), chain.state_root.hex()
            self._log.emit(
                events.Diverged(peer=self._payload_store.peer_id, round=chain.rounds, expected=expected, found=found)
            )
        elif 0 < status.rounds - chain.rounds <= self._replayed_at_most and await self._replay(if_cheaper=True):
            return
        record = None
        if status.rounds:
            record = self._last_record(status)
            if record is None or record.plan.round != status.rounds or not self._is_attested(status):
                await self._client.until(lambda new: new.version != status.version)
                return
        self._log.emit(events.PhaseChanged(round=status.rounds, phase="joining"))
        try:
            await self._fetch(record, status.state_root)
        except FetchError as error:
            try:  # most likely the state has changed
                async with asyncio.timeout(RETRY_SECONDS):
                    await self._client.until(
                        lambda new: new.rounds > status.rounds and is_behind(new, self._replica.chain)
                    )
            except TimeoutError:
                self._warn(f"{error}; trying again")

    async def _replay(self, *, if_cheaper: bool) -> bool:
        """Repeat the outer steps of the rounds that this node missed. Return whether it took any.

        With ``if_cheaper`` it stops where the outer state would be less to fetch.
        """
        began = self._replica.chain.rounds
        others = await self._others()
        try:
            while missing := await self._chain_fetcher.fetch_after(self._replica.chain, others):
                if if_cheaper and self._bytes_of(missing) > self._replica.outer.tensor.nbytes:
                    break
                for record, certificate in missing:
                    if not await self._repeat_outer_step(record, certificate, others):
                        return False  # this node's state differs from the run's
        except FetchError as error:
            self._warn(f"cannot repeat all missed outer steps: {error}")
        if self._replica.chain.rounds == began:
            return False
        self._log_caught_up(began)
        await self._client.send_hello()
        return True

    async def _repeat_outer_step(self, record: Record, certificate: bytes, others: Sequence[str] = ()) -> bool:
        """Take the outer step of a past round. Return False if it starts from another state than this node's.

        The round's members may all be gone, so payloads are also fetched from ``others``, who took the same outer step.
        Raises ``FetchError``.
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
        """Fetch and adopt the outer state after ``record``, whose certificate the voter saw last.

        Raises ``FetchError``; the chunks received by then are kept for the next attempt.
        """
        members = [] if record is None else [member.node for member in record.plan.members]
        holders = [*members, *await self._others()]
        goal = self._replica.chain_position(record, root)
        partial = await self._resume_fetch(goal, holders)
        try:
            outer = await partial.fetch(self._payload_store.network, root, holders)
        except FetchError:
            self._partial = partial, goal
            raise
        seconds = partial.seconds
        await self._state.adopt(outer, record)
        self._log.emit(
            events.Resynchronised(
                round=goal.rounds,
                state_root=root.hex(),
                donor="the members",
                gave=tuple(partial.gave.most_common()),
                seconds=seconds,
                moved=partial.moved,
            )
        )
        await self._client.send_hello()

    async def _resume_fetch(self, goal: Chain, holders: list[str]) -> PartialState:
        """Return the partly fetched state of an earlier attempt, moved to ``goal``; an empty one if that costs more."""
        begun, self._partial = self._partial, None
        if begun is not None:
            partial, at = begun
            try:
                if at.head == goal.head or await self._move(partial, at, goal, holders):
                    return partial
            except FetchError as error:
                self._warn(f"cannot move the partly fetched state to the current round: {error}; fetching it anew")
        return PartialState(self._replica.outer.theta.numel())

    async def _move(self, partial: PartialState, at: Chain, goal: Chain, holders: list[str]) -> bool:
        """Take the outer steps from ``at`` to ``goal`` on ``partial``; return False if that is more to fetch.

        An outer step works element by element, so it is right on every chunk that has arrived. Raises ``FetchError``.
        """
        told = await self._chain_fetcher.fetch_after(at, holders)
        missing = [(record, certificate) for record, certificate in told if record.plan.round <= goal.rounds]
        if not missing or missing[-1][0].hash != goal.head or self._bytes_of(missing) >= partial.received:
            return False
        for record, _ in missing:
            exchange = self._exchange(record.plan)
            exchange.followers = holders
            gradient = await exchange.outer_gradient(record)
            await asyncio.to_thread(self._replica.outer_step, record.plan.round, gradient, partial.outer)
        partial.moved += len(missing)
        steps = plural(len(missing), "outer step")
        text = f"the state changed during the download: took {steps} on the {size(partial.received)} received so far"
        self._log.emit(events.Notice(level="info", text=text))
        return True

    def _bytes_of(self, missing: list[CertifiedRecord]) -> int:
        """Estimate the bytes to fetch for the outer steps of ``missing``: those not on this disk."""
        held = self._payload_store.journal
        return sum(size for record, _ in missing for root, size in applied_blobs(record).items() if root not in held)

    async def _others(self) -> list[str]:
        """Return the peers to ask for past rounds, connected ones first."""
        return await self._payload_store.network.sources(self._replica.manifest.resolved.coordinators)

    def _last_record(self, status: RunStatus) -> Record | None:
        """Return the last certified record if its certificate is valid, else None."""
        try:
            return None if status.certificate is None else self._voter.record_of(status.certificate)
        except BadCertificate as error:
            self._warn(f"invalid certificate from the coordinator: {error}")
            return None

    def _is_attested(self, status: RunStatus) -> bool:
        """Return whether more than half of the voting weight attests the state that ``status`` names.

        A node that has been in the run without a break counts the weights it knows: a record that its coordinator made
        with others cannot replace them.
        """
        record = self._last_record(status)
        if record is None:
            return False
        known = self._replica.chain.weights if self._client.contact_seconds > self._patience else {}
        return attests_state(
            status.attestations,
            round_number=status.rounds,
            state_root=status.state_root,
            weights=known or record.weights,
            run_id=self._replica.manifest.run_id,
            open_envelope=open_envelope,
        )

    def _log_caught_up(self, began: int) -> None:
        now = self._replica.chain.rounds
        self._log.emit(events.CaughtUp(round=now, rounds=now - began))


def is_behind(status: RunStatus, chain: Chain) -> bool:
    """Return whether the run has certified a state that a node at ``chain`` does not hold."""
    known = status.state_root != bytes(32)  # a restarted coordinator does not know it yet
    return known and status.rounds >= chain.rounds and status.state_root != chain.state_root
