"""What a member measures of a round, made up."""

from __future__ import annotations

from psyche.telemetry.events import MemberMetrics


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
