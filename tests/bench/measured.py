"""What a member measures of a round, made up."""

from __future__ import annotations

from psyche.protocol.messages import Metrics


def metrics(steps: int, train_seconds: float) -> Metrics:
    """Of ``steps`` inner steps in a round of 10 s."""
    return Metrics(
        train_loss=1.0,
        heldout_loss_sum=1.0,
        heldout_tokens=1,
        tokens=1,
        inner_steps=steps,
        train_seconds=train_seconds,
        exchange_seconds=1.5,
        round_seconds=10.0,
        lr=1.0,
        pseudo_gradient_norm=1.0,
        momentum_norm=1.0,
        bytes_up=1,
        bytes_down=1,
        payload_bytes=1,
    )
