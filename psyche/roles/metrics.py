"""A member's signed metrics as an event, for the coordinator's log and the member's own."""

from __future__ import annotations

from psyche.protocol.messages import Metrics
from psyche.telemetry import events


def metrics_event(node: str, round: int, body: Metrics) -> events.MemberMetrics:
    """What ``node`` measured of ``round``."""
    fields = {name: getattr(body, name) for name in body.__struct_fields__}
    seconds = body.train_seconds
    return events.MemberMetrics(
        round=round, peer=node, tokens_per_second=body.tokens / seconds if seconds > 0 else None, **fields
    )
