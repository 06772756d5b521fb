"""What a worker says of a round that is certified: to the coordinator, and to its own log."""

from __future__ import annotations

import contextlib

from psyche.diloco.replica import LocalUpdate, Replica
from psyche.network.transport import Network, Refused
from psyche.protocol.messages import Plan, Record
from psyche.protocol.standing import probation_note
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog
from psyche.telemetry.metrics import signed_metrics
from psyche.worker.coordinator_client import CoordinatorClient
from psyche.worker.meter import Meter
from psyche.worker.training_thread import Trainer


class Reporter:
    """One node's."""

    def __init__(
        self,
        replica: Replica,
        network: Network,
        client: CoordinatorClient,
        trainer: Trainer,
        meter: Meter,
        log: EventLog,
    ) -> None:
        self._replica, self._network, self._client = replica, network, client
        self._trainer, self._meter, self._log = trainer, meter, log

    def announce(self, record: Record) -> None:
        """What this node's owner wants to know of ``record``, whose outer step is taken."""
        node = self._replica.node
        self._log.emit(
            events.RoundCertified(
                round=record.plan.round,
                accepted=tuple(accepted.node for accepted in record.accepted),
                excluded=tuple((excluded.node, excluded.reason) for excluded in record.excluded),
                state_root=self._replica.chain.state_root.hex(),
                seconds=self._meter.total(),
            )
        )
        if node in record.dissenters:
            self._log.emit(events.outvoted(node, record.plan.round))
        if text := probation_note(record, node, self._replica.run.rounds.probation):
            self._log.emit(events.Notice(level="info", text=text))

    async def report(self, plan: Plan, work: LocalUpdate | None, *, judge: bool = True) -> None:
        """Judge this node's share of the held-out set, unless there is no time, and tell the coordinator what the round
        was like."""
        replica, heldout = self._replica, (0.0, 0)
        if judge:
            rank = [member.node for member in plan.members].index(replica.node)
            heldout = await self._trainer.do(replica.heldout_loss, rank, len(plan.members))
        momentum_norm = await self._trainer.do(replica.momentum_norm)
        metrics = self._meter.metrics(plan.round, replica.node, work, heldout, momentum_norm, self._network.traffic)
        self._log.emit(metrics)
        with contextlib.suppress(Refused):
            await self._client.submit(signed_metrics(metrics), plan.round)
