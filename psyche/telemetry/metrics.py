"""The names under which numbers are logged to W&B: the one table that the logger and the dashboard share."""

from __future__ import annotations

from typing import Literal

import msgspec

from psyche.telemetry.events import Event, GenesisJudged, MemberMetrics, RoundSummary, StepDone

OUTER_STEP = "outer_step"
"""Axis: outer steps taken; 0 is the model before round 1, round r ends with step r."""
TOKENS = "tokens"
"""Axis: tokens trained on by all members together."""
INNER_STEP = "inner_step"
"""Axis of a node's own run: its inner steps so far."""

Section = Literal["loss", "throughput", "wire", "members", "health"]


class Metric(msgspec.Struct, frozen=True):
    """One line of a plot: the W&B key, the event field it comes from, the axis it is drawn over."""

    key: str
    field: str
    axis: str
    section: Section
    title: str
    summary: Literal["min", "max", "mean", "last"] = "last"


SWARM = (
    Metric("heldout/loss", "heldout_loss", OUTER_STEP, "loss", "Held-out loss (nats/token)", "min"),
    Metric("train/loss", "train_loss", OUTER_STEP, "loss", "Training loss (nats/token)", "min"),
    # W&B draws a key over one axis only, so that losses over tokens need keys of their own.
    Metric("heldout_by_tokens/loss", "heldout_loss", TOKENS, "loss", "Held-out loss over tokens", "min"),
    Metric("train_by_tokens/loss", "train_loss", TOKENS, "loss", "Training loss over tokens", "min"),
    Metric("train/lr", "lr", OUTER_STEP, "loss", "Inner learning rate"),
    Metric("throughput/tokens_per_second", "tokens_per_second", OUTER_STEP, "throughput", "Tokens/s, all members"),
    Metric("throughput/compute_utilisation", "compute_utilisation", OUTER_STEP, "throughput", "Time spent training"),
    Metric("throughput/round_seconds", "seconds", OUTER_STEP, "throughput", "Round duration (s)"),
    Metric("throughput/exchange_seconds", "exchange_seconds", OUTER_STEP, "throughput", "Exchange, median (s)"),
    Metric(
        "throughput/exchange_seconds_max", "exchange_seconds_max", OUTER_STEP, "throughput", "Exchange, slowest (s)"
    ),
    Metric("wire/bytes_up", "bytes_up", OUTER_STEP, "wire", "Bytes sent in the round"),
    Metric("wire/bytes_down", "bytes_down", OUTER_STEP, "wire", "Bytes received in the round"),
    Metric("wire/bytes_up_total", "bytes_up_total", OUTER_STEP, "wire", "Bytes sent so far"),
    Metric("wire/bytes_down_total", "bytes_down_total", OUTER_STEP, "wire", "Bytes received so far"),
    Metric("wire/bytes_per_token", "bytes_per_token", OUTER_STEP, "wire", "Bytes sent per token"),
    Metric("wire/payload_ratio", "payload_ratio", OUTER_STEP, "wire", "Payload ratio (fp32 size / payload)"),
    Metric("members/accepted", "members", OUTER_STEP, "members", "Members accepted"),
    Metric("members/excluded", "excluded", OUTER_STEP, "members", "Members left out"),
    Metric("members/reports", "reports", OUTER_STEP, "members", "Members' metrics received"),
    Metric("health/pseudo_gradient_norm", "pseudo_gradient_norm", OUTER_STEP, "health", "Pseudo-gradient norm"),
    Metric("health/momentum_norm", "momentum_norm", OUTER_STEP, "health", "Outer momentum norm"),
    Metric("health/divergences_total", "divergences_total", OUTER_STEP, "health", "Divergences so far"),
    Metric("health/rejections_total", "rejections_total", OUTER_STEP, "health", "Rejections so far"),
    Metric("health/audits_total", "audits_total", OUTER_STEP, "health", "Audits that ended"),
    Metric("health/convictions_total", "convictions_total", OUTER_STEP, "health", "Nodes convicted so far"),
    Metric("health/refused_reports", "refused", OUTER_STEP, "health", "Members' metrics refused"),
)
"""The coordinator's run: fields of :class:`RoundSummary`."""

NODE_STEP = (
    Metric("node/loss", "loss", INNER_STEP, "members", "Loss of single nodes", "min"),
    Metric("node/lr", "lr", INNER_STEP, "members", "Learning rate of single nodes"),
    Metric("node/tokens_per_second", "tokens_per_second", INNER_STEP, "members", "Tokens/s of single nodes"),
)
"""A node's own run: fields of :class:`StepDone`."""

NODE_ROUND = (
    Metric("node_round/train_loss", "train_loss", OUTER_STEP, "members", "Round loss of single nodes", "min"),
    Metric("node_round/train_seconds", "train_seconds", OUTER_STEP, "members", "Training time of single nodes (s)"),
    Metric("node_round/exchange_seconds", "exchange_seconds", OUTER_STEP, "members", "Exchange of single nodes (s)"),
    Metric("node_round/bytes_up", "bytes_up", OUTER_STEP, "members", "Bytes sent by single nodes"),
    Metric("node_round/bytes_down", "bytes_down", OUTER_STEP, "members", "Bytes received by single nodes"),
)
"""A node's own run: fields of its :class:`MemberMetrics`."""

ALL = SWARM + NODE_STEP + NODE_ROUND


def swarm_row(event: Event) -> dict[str, float]:
    """What the coordinator's run logs for ``event``; empty for events it does not log."""
    match event:
        case GenesisJudged(heldout_loss=loss) if loss is not None:
            return {OUTER_STEP: 0, TOKENS: 0, "heldout/loss": loss, "heldout_by_tokens/loss": loss}
        case RoundSummary():
            return {OUTER_STEP: event.round, TOKENS: event.tokens_total} | _row(event, SWARM)
        case _:
            return {}


def node_row(event: Event) -> dict[str, float]:
    """What a node's own run logs for ``event``; empty for events it does not log."""
    match event:
        case StepDone():
            return {INNER_STEP: event.global_step} | _row(event, NODE_STEP)
        case MemberMetrics() if event.peer == event.node:
            return {OUTER_STEP: event.round} | _row(event, NODE_ROUND)
        case _:
            return {}


def _row(event: Event, table: tuple[Metric, ...]) -> dict[str, float]:
    values = {metric.key: getattr(event, metric.field) for metric in table}
    return {key: value for key, value in values.items() if value is not None}
