"""Stand-ins for a clock and for a node's metrics."""

from __future__ import annotations

from psyche.telemetry.events import MemberMetrics


class Clock:
    """A clock that moves when told to, and by ``tick`` each time it is read."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 1000.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def metrics(round_number: int, peer: str, steps: int, train_seconds: float) -> MemberMetrics:
    """Metrics of ``peer`` for ``steps`` inner steps in a round of 10 s."""
    return MemberMetrics(
        round=round_number,
        peer=peer,
        inner_steps=steps,
        train_seconds=train_seconds,
        exchange_seconds=1.5,
        round_seconds=10.0,
    )
