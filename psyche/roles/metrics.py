"""What a member measures of a round, and how it is told: signed to the coordinator, as an event to the logs."""

from __future__ import annotations

import time

from psyche.network.streams import TrafficCounter
from psyche.protocol.messages import Metrics
from psyche.roles.replica import Work
from psyche.telemetry import events


class Meter:
    """Where the time and the bytes of a round went, on this node's clock."""

    def __init__(self) -> None:
        self._up = self._down = 0
        self.start()

    def start(self) -> None:
        """A round begins."""
        self._began = self._last = time.monotonic()
        self._parts: dict[str, float] = {}

    def mark(self, part: str) -> None:
        """What passed since the last mark belongs to ``part``."""
        now = time.monotonic()
        self._parts[part] = now - self._last
        self._last = now

    def total(self) -> float:
        """Seconds since the round began."""
        return time.monotonic() - self._began

    def metrics(
        self, work: Work | None, heldout: tuple[float, int], momentum_norm: float, traffic: TrafficCounter
    ) -> Metrics:
        """All of it. Bytes are those since the last call. ``work`` is None where the node only followed."""
        up, down = traffic.bytes_up - self._up, traffic.bytes_down - self._down
        self._up, self._down = traffic.bytes_up, traffic.bytes_down
        done = work.contribution if work else None
        return Metrics(
            train_loss=work.loss if work else 0.0,
            heldout_loss_sum=heldout[0],
            heldout_tokens=heldout[1],
            tokens=done.tokens if done else 0,
            inner_steps=done.inner_steps if done else 0,
            train_seconds=self._parts.get("train", 0.0),
            exchange_seconds=self._parts.get("exchange", 0.0),
            round_seconds=self.total(),
            lr=work.lr if work else 0.0,
            pseudo_gradient_norm=work.norm if work else 0.0,
            momentum_norm=momentum_norm,
            bytes_up=up,
            bytes_down=down,
            payload_bytes=done.payload_bytes if done else 0,
        )


def metrics_event(node: str, round: int, body: Metrics) -> events.MemberMetrics:
    """What ``node`` measured of ``round``."""
    fields = {name: getattr(body, name) for name in body.__struct_fields__}
    seconds = body.train_seconds
    return events.MemberMetrics(
        round=round, peer=node, tokens_per_second=body.tokens / seconds if seconds > 0 else None, **fields
    )
