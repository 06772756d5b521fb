"""What a member measures of a round, as an event in its log and as signed metrics for the coordinator."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from psyche.diloco.replica import LocalUpdate, Replica
from psyche.network.bandwidth import Traffic
from psyche.network.transport import Network, Refused
from psyche.protocol.messages import Plan, Record
from psyche.protocol.standing import probation_note
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog
from psyche.telemetry.metrics import signed_metrics
from psyche.worker.coordinator_client import CoordinatorClient

if TYPE_CHECKING:
    from psyche.worker.training_thread import TrainingThread


class RoundTimer:
    """Measures where the time and the bytes of a round went, on this node's clock."""

    def __init__(self) -> None:
        self._up = self._down = 0
        self._training = 0.0
        self._exchange = 0.0
        self._reported = self._began = time.monotonic()

    def start_round(self) -> None:
        """Start measuring a round."""
        self._began = time.monotonic()
        self._exchange = 0.0

    def add_training(self, seconds: float) -> None:
        """Count time spent on inner steps. Called on the training thread."""
        self._training += seconds

    def start_exchange(self) -> None:
        """Start measuring the exchange: this round's payload is ready."""
        self._exchange = -time.monotonic()

    def end_exchange(self) -> None:
        """Stop measuring the exchange: the outer step is done."""
        self._exchange += time.monotonic() if self._exchange < 0 else 0.0

    def round_seconds(self) -> float:
        """Return the seconds since the round began."""
        return time.monotonic() - self._began

    def metrics(
        self,
        round_number: int,
        node: str,
        update: LocalUpdate | None,
        heldout: tuple[float, int],
        momentum_norm: float,
        traffic: Traffic,
    ) -> events.MemberMetrics:
        """Return the metrics of a round. Bytes, training time and round time are those since the last call, so that
        overlap steps count in the round in which they were taken. ``update`` is None if the node did not train."""
        now = time.monotonic()
        training, self._training = self._training, 0.0
        period, self._reported = now - self._reported, now
        up, down = traffic.bytes_up - self._up, traffic.bytes_down - self._down
        self._up, self._down = traffic.bytes_up, traffic.bytes_down
        done = update.contribution if update else None
        return events.MemberMetrics(
            round=round_number,
            peer=node,
            train_loss=_reported_loss(update),
            heldout_loss_sum=heldout[0],
            heldout_tokens=heldout[1],
            tokens=done.tokens if done else 0,
            inner_steps=done.inner_steps if done else 0,
            train_seconds=training,
            exchange_seconds=max(self._exchange, 0.0),
            round_seconds=period,
            lr=update.lr if update else 0.0,
            pseudo_gradient_norm=update.norm if update else 0.0,
            momentum_norm=momentum_norm,
            bytes_up=up,
            bytes_down=down,
            payload_bytes=done.payload_bytes if done else 0,
        )


def _reported_loss(update: LocalUpdate | None) -> float | None:
    if update is None:
        return 0.0
    return None if update.contribution.private else update.loss


class RoundReporter:
    """Reports each certified round: to the node's own log and, as signed metrics, to the coordinator."""

    def __init__(
        self, replica: Replica, network: Network, client: CoordinatorClient, trainer: TrainingThread, log: EventLog
    ) -> None:
        self._replica, self._network, self._client = replica, network, client
        self._trainer, self._log = trainer, log

    def announce(self, record: Record) -> None:
        """Log a certified round after its outer step."""
        node = self._replica.node
        self._log.emit(
            events.RoundCertified(
                round=record.plan.round,
                accepted=tuple(accepted.node for accepted in record.accepted),
                excluded=tuple((excluded.node, excluded.reason) for excluded in record.excluded),
                state_root=self._replica.chain.state_root.hex(),
                seconds=self._trainer.timer.round_seconds(),
            )
        )
        if node in record.dissenters:
            self._log.emit(events.outvoted(node, record.plan.round))
        if text := probation_note(record, node, self._replica.run.rounds.probation):
            self._log.emit(events.Notice(level="info", text=text))

    async def report(self, plan: Plan, update: LocalUpdate | None, *, evaluate: bool = True) -> None:
        """Evaluate this node's share of the held-out set and submit the round's metrics.

        ``evaluate=False`` skips the evaluation: a leaving node has no time for it.
        """
        replica, heldout = self._replica, (0.0, 0)
        if evaluate:
            rank = [member.node for member in plan.members].index(replica.node)
            heldout = await self._trainer.do(replica.heldout_loss, rank, len(plan.members))
        momentum_norm = await self._trainer.do(replica.momentum_norm)
        metrics = self._trainer.timer.metrics(
            plan.round, replica.node, update, heldout, momentum_norm, self._network.traffic
        )
        self._log.emit(metrics)
        with contextlib.suppress(Refused):
            await self._client.submit(signed_metrics(metrics), plan.round)
