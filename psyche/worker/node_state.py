"""The node's state on its way from round to round: replica, ledger, served state and checkpoints move together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from psyche.config import Node
from psyche.diloco.checkpoint import Checkpoint, save
from psyche.diloco.replica import Replica
from psyche.errors import PsycheError
from psyche.exchange.payload_store import PayloadStore
from psyche.ledger.writer import LedgerWriter
from psyche.network.transport import Network
from psyche.numerics.aggregate import Gradient
from psyche.numerics.outer import OuterState
from psyche.protocol.messages import Record
from psyche.protocol.standing import keeps_half, total
from psyche.protocol.takeover import MINORITY_SILENCES
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog
from psyche.worker.state_transfer import Snapshots, serve_state
from psyche.worker.training_thread import TrainingThread
from psyche.worker.voter import Voter

RunFunction = Callable[[Callable[[], None]], Awaitable[None]]
"""Runs a function when the replica's engine is free."""


class ElectorateReplaced(PsycheError):
    """The coordinator dropped voters that were connected."""


class NodeState:
    """Moves a replica along the chain, with everything that has to keep step, and writes checkpoints.

    The certificate of the record it moves to is the one that the voter saw last.
    """

    def __init__(
        self,
        replica: Replica,
        settings: Node,
        directory: Path,
        *,
        network: Network,
        ledger: LedgerWriter,
        payload_store: PayloadStore,
        voter: Voter,
        trainer: TrainingThread,
        update_local: RunFunction,
        contact_seconds: Callable[[], float],
        log: EventLog,
    ) -> None:
        """``update_local`` runs what changes x; while an audit borrows the engine it need not wait for the trainer."""
        self._replica, self._settings, self._directory = replica, settings, directory / "checkpoints"
        self._network, self._ledger, self._voter, self._log = network, ledger, voter, log
        self._payload_store, self._trainer, self._update_local = payload_store, trainer, update_local
        self._contact_seconds = contact_seconds
        self._snapshots = Snapshots(network, settings.checkpoints_kept)
        self._saved = replica.chain.rounds
        self._serve(previous=b"")

    async def apply(self, record: Record, gradient: Gradient) -> None:
        """Take the outer step of ``record``. Raises :class:`ElectorateReplaced`."""
        self._check_electorate(record)
        replica, before = self._replica, self._replica.chain.state_root
        await asyncio.to_thread(replica.outer_step, record.plan.round, gradient)
        await self._update_local(lambda: replica.apply_record_update(record))
        await asyncio.to_thread(replica.commit_state, record)
        self._record(record)
        self._serve(before)

    async def adopt(self, outer: OuterState, record: Record | None) -> None:
        """Adopt a fetched state: that after ``record``, or that before round 1."""
        replica, before = self._replica, self._replica.chain.state_root
        await self._update_local(lambda: replica.adopt(outer, record))
        if record is not None:
            self._record(record)
        self._serve(before)

    def _check_electorate(self, record: Record) -> None:
        """Refuse a reconfiguration that drops this node, and half of the weight with it, though it was connected."""
        replica, weights = self._replica, self._replica.chain.weights
        dropped = replica.node in weights and replica.node not in record.electorate
        patience = MINORITY_SILENCES * replica.run.deadlines.silence
        if dropped and not keeps_half(record.electorate, weights) and self._contact_seconds() > patience:
            share = total(weights, record.electorate) / total(weights)
            raise ElectorateReplaced(
                f"round {record.plan.round} was certified by {share:.0%} of the voting weight, without this node, "
                "which was connected all the time: the coordinator has replaced the voters. Ask its operator; to "
                "follow it all the same, run the same command again"
            )

    def _record(self, record: Record) -> None:
        assert self._voter.certificate is not None
        self._ledger.check()
        self._ledger.enter(self._voter.certificate, record, self._replica.chain.state_root)

    def _serve(self, previous: bytes) -> None:
        serve_state(self._network, self._replica.host, self._replica.index, previous)

    async def save(self, *, force: bool = False) -> None:
        """Write a checkpoint if one is due (``node.checkpoint_every``) or with ``force``, unless this round has one.

        Older payload journals are then discarded, and the new checkpoint's state is served.
        """
        chain = self._replica.chain
        due = chain.rounds % self._settings.checkpoint_every == 0 or force
        if not due or chain.rounds == self._saved:
            return
        certificates = () if self._voter.certificate is None else (self._voter.certificate,)

        def write() -> Path:
            checkpoint = Checkpoint(
                run_id=self._replica.manifest.run_id,
                chain=chain,
                outer=self._replica.host.tensor,
                residual=self._replica.residual,
                inner=self._replica.engine.state(),  # with several ranks this gathers, which takes time
                certificates=certificates,
            )
            return save(checkpoint, self._directory, keep=self._settings.checkpoints_kept)

        path = await self._trainer.do(write)
        self._saved = chain.rounds
        await asyncio.to_thread(self._snapshots.add, chain.rounds, self._replica.index, path)
        if self._snapshots.oldest:
            await asyncio.to_thread(self._payload_store.discard_before, self._snapshots.oldest + 1)
        self._log.emit(events.Checkpointed(round=chain.rounds, path=str(path)))
