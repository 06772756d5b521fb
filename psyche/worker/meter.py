"""What a member measures of a round, and how it is told: signed to the coordinator, as an event to the logs."""

from __future__ import annotations

import time

from psyche.diloco.replica import LocalUpdate
from psyche.network.bandwidth import Traffic
from psyche.telemetry.events import MemberMetrics


class Meter:
    """Where the time and the bytes of a round went, on this node's clock."""

    def __init__(self) -> None:
        self._up = self._down = 0
        self._training = 0.0
        self._exchange = 0.0
        self._reported = self._began = time.monotonic()

    def start(self) -> None:
        """A round begins."""
        self._began = time.monotonic()
        self._exchange = 0.0

    def trained(self, seconds: float) -> None:
        """So much time went into inner steps. Called on the thread that trains."""
        self._training += seconds

    def exchanging(self) -> None:
        """This round's payload is ready."""
        self._exchange = -time.monotonic()

    def exchanged(self) -> None:
        """The outer step has been taken."""
        self._exchange += time.monotonic() if self._exchange < 0 else 0.0

    def total(self) -> float:
        """Seconds since the round began."""
        return time.monotonic() - self._began

    def metrics(
        self,
        round_number: int,
        node: str,
        work: LocalUpdate | None,
        heldout: tuple[float, int],
        momentum_norm: float,
        traffic: Traffic,
    ) -> MemberMetrics:
        """All of it. Bytes, training and round are those since the last call, so that late steps count where they were
        taken. ``work`` is None where the node only followed."""
        now = time.monotonic()
        training, self._training = self._training, 0.0
        period, self._reported = now - self._reported, now
        up, down = traffic.bytes_up - self._up, traffic.bytes_down - self._down
        self._up, self._down = traffic.bytes_up, traffic.bytes_down
        done = work.contribution if work else None
        return MemberMetrics(
            round=round_number,
            peer=node,
            train_loss=_told_loss(work),
            heldout_loss_sum=heldout[0],
            heldout_tokens=heldout[1],
            tokens=done.tokens if done else 0,
            inner_steps=done.inner_steps if done else 0,
            train_seconds=training,
            exchange_seconds=max(self._exchange, 0.0),
            round_seconds=period,
            lr=work.lr if work else 0.0,
            pseudo_gradient_norm=work.norm if work else 0.0,
            momentum_norm=momentum_norm,
            bytes_up=up,
            bytes_down=down,
            payload_bytes=done.payload_bytes if done else 0,
        )


def _told_loss(work: LocalUpdate | None) -> float | None:
    if work is None:
        return 0.0
    return None if work.contribution.private else work.loss
