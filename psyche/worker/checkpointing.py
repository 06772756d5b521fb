"""Checkpoints of a node, and what follows from one: older journals are forgotten, newer states are served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from psyche.config import Node
from psyche.diloco.checkpoint import Checkpoint, save
from psyche.diloco.replica import Replica
from psyche.exchange.payload_store import PayloadStore
from psyche.network.transport import Network
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog
from psyche.worker.snapshots import Snapshots
from psyche.worker.voter import Voter


class Saver:
    """Of one worker."""

    def __init__(
        self,
        replica: Replica,
        settings: Node,
        directory: Path,
        *,
        network: Network,
        payload_store: PayloadStore,
        voter: Voter,
        on_trainer: Callable[[Callable[[], Path]], Awaitable[Path]],
        log: EventLog,
    ) -> None:
        self._replica, self._settings, self._directory = replica, settings, directory / "checkpoints"
        self._payload_store, self._voter, self._on_trainer, self._log = payload_store, voter, on_trainer, log
        self._snapshots = Snapshots(network, settings.checkpoints_kept)
        self._saved = replica.chain.rounds

    async def save(self, *, force: bool = False) -> None:
        """Write one if it is due (``node.checkpoint_every``), or in any case, unless the last is of this round."""
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
                inner=self._replica.engine.state(),  # of several ranks it is fetched, which takes its time
                certificates=certificates,
            )
            return save(checkpoint, self._directory, keep=self._settings.checkpoints_kept)

        path = await self._on_trainer(write)
        self._saved = chain.rounds
        await asyncio.to_thread(self._snapshots.add, chain.rounds, self._replica.index, path)
        if self._snapshots.oldest:
            await asyncio.to_thread(self._payload_store.discard_before, self._snapshots.oldest + 1)
        self._log.emit(events.Checkpointed(round=chain.rounds, path=str(path)))
