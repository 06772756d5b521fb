"""Metrics as two tables: what members report of a round, and what W&B draws.

:data:`MEASUREMENTS` lists the fields of :class:`MemberMetrics`. The signed message carries them by name, the
coordinator bounds them, and the monitor combines them over members. :data:`PLOTS` lists the W&B keys; the logger and
the dashboard both read them. ``README.md`` in this folder says how to add a metric.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from psyche.config import Run
from psyche.protocol.messages import Metrics
from psyche.protocol.wire import MalformedMessage
from psyche.telemetry.events import Event, GenesisJudged, MemberMetrics, RoundSummary, StepDone

LOSS_MAX = 1e4
"""Nats per token; an untrained model has ln(vocabulary), about 10."""
SECONDS_MAX = 30 * 24 * 3600.0
NORM_MAX = 1e15
CONTROL_BYTES = 64 * 2**20
"""Upper bound on the bytes a member spends in a round on messages other than payloads and state."""


class Limits(msgspec.Struct, frozen=True):
    """The largest counts that one member can report for one round of this run."""

    inner_steps: int
    tokens: int
    heldout_tokens: int
    payload_bytes: int
    bytes_each_way: int

    @classmethod
    def of(cls, run: Run, parameters: int, members: int) -> Limits:
        """Derive the limits from the run, the model's parameter count and the number of members in the round."""
        steps = 2 * run.rounds.inner_steps  # overlap: a node keeps training while the round before is exchanged
        return cls(
            inner_steps=steps,
            tokens=steps * run.tokens_per_step,
            heldout_tokens=run.heldout_sequences * run.data.sequence_length,
            payload_bytes=4 * parameters + CONTROL_BYTES,
            # Worst case: every member's fp32 payload, and the whole outer state (θ and m) to or from every member.
            bytes_each_way=12 * parameters * (members + 1) + CONTROL_BYTES,
        )


class Measurement(msgspec.Struct, frozen=True):
    """A number that members report: its field in :class:`MemberMetrics`, its bound, how members are combined."""

    field: str
    limit: float | Callable[[Limits, MemberMetrics], float]
    """Largest possible value; the smallest is 0. A report with a value out of bounds is refused as a whole."""
    combine: Literal["sum", "median"] | None = None
    """How the monitor fills the field of the same name in :class:`RoundSummary`. ``None``: there is no such field,
    or :func:`psyche.telemetry.monitor.summarise` computes it from several measurements."""


MEASUREMENTS = (
    Measurement("train_loss", LOSS_MAX),
    Measurement("heldout_loss_sum", lambda limits, report: LOSS_MAX * max(report.heldout_tokens, 1)),
    Measurement("heldout_tokens", lambda limits, report: limits.heldout_tokens),
    Measurement("tokens", lambda limits, report: limits.tokens, "sum"),
    Measurement("inner_steps", lambda limits, report: limits.inner_steps),
    Measurement("train_seconds", SECONDS_MAX),
    Measurement("exchange_seconds", SECONDS_MAX),
    Measurement("round_seconds", SECONDS_MAX),
    Measurement("lr", 1e3, "median"),
    Measurement("pseudo_gradient_norm", NORM_MAX, "median"),
    Measurement("momentum_norm", NORM_MAX, "median"),
    Measurement("bytes_up", lambda limits, report: limits.bytes_each_way, "sum"),
    Measurement("bytes_down", lambda limits, report: limits.bytes_each_way, "sum"),
    Measurement("payload_bytes", lambda limits, report: limits.payload_bytes),
)


def signed_metrics(event: MemberMetrics) -> Metrics:
    """Convert this node's own measurements to the message that it signs. Missing measurements are left out."""
    values = {one.field: getattr(event, one.field) for one in MEASUREMENTS}
    return Metrics({name: value for name, value in values.items() if value is not None})


def metrics_event(node: str, round_number: int, body: Metrics) -> MemberMetrics:
    """Convert a member's signed message to an event. Names that this version does not know are ignored.

    Raises :class:`MalformedMessage` where a value has the wrong type. Bounds are checked by :func:`fault`.
    """
    values: dict[str, object] = {one.field: body.values[one.field] for one in MEASUREMENTS if one.field in body.values}
    try:
        return msgspec.convert(values | {"round": round_number, "peer": node}, MemberMetrics)
    except msgspec.ValidationError as error:
        raise MalformedMessage(f"metrics of round {round_number}: {error}") from None


def fault(report: MemberMetrics, limits: Limits) -> str:
    """Name the value in ``report`` that is impossible; ``""`` if there is none. ``None`` (not measured) is possible."""
    for one in MEASUREMENTS:
        value = getattr(report, one.field)
        most = one.limit if isinstance(one.limit, float) else one.limit(limits, report)
        if value is not None and not 0 <= value <= most:  # also false for NaN
            return f"{one.field} is not between 0 and {most:g}"
    return ""


# ----------------------------------------------------------------------------------------------- W&B

OUTER_STEP = "outer_step"
"""Axis: outer steps taken. 0 is the model before round 1; round r ends with step r."""
TOKENS = "tokens"
"""Axis: tokens trained on by all members together."""
INNER_STEP = "inner_step"
"""Axis of a node's own W&B run: the inner steps that it has taken."""

Section = Literal["loss", "throughput", "wire", "members", "health"]


class Plot(msgspec.Struct, frozen=True):
    """One line of a W&B panel: its key, the event field it shows, its x axis."""

    key: str
    field: str
    axis: str
    section: Section
    panel: str
    """Title of the panel. Lines with the same title share a panel."""
    summary: Literal["min", "max", "mean", "last"] = "last"


SWARM_PLOTS = (
    Plot("heldout/loss", "heldout_loss", OUTER_STEP, "loss", "Loss (nats/token)", "min"),
    Plot("train/loss", "train_loss", OUTER_STEP, "loss", "Loss (nats/token)", "min"),
    # W&B draws a key over one axis only, so losses over tokens have keys of their own.
    Plot("heldout_by_tokens/loss", "heldout_loss", TOKENS, "loss", "Loss over tokens", "min"),
    Plot("train_by_tokens/loss", "train_loss", TOKENS, "loss", "Loss over tokens", "min"),
    Plot("train/lr", "lr", OUTER_STEP, "loss", "Inner learning rate"),
    Plot("throughput/tokens_per_second", "tokens_per_second", OUTER_STEP, "throughput", "Tokens/s, all members"),
    Plot("throughput/compute_utilisation", "compute_utilisation", OUTER_STEP, "throughput", "Time spent training"),
    Plot("throughput/round_seconds", "seconds", OUTER_STEP, "throughput", "Round duration (s)"),
    Plot("throughput/exchange_seconds", "exchange_seconds", OUTER_STEP, "throughput", "Exchange: median, slowest (s)"),
    Plot(
        "throughput/exchange_seconds_max",
        "exchange_seconds_max",
        OUTER_STEP,
        "throughput",
        "Exchange: median, slowest (s)",
    ),
    Plot("wire/bytes_up", "bytes_up", OUTER_STEP, "wire", "Bytes sent and received in the round"),
    Plot("wire/bytes_down", "bytes_down", OUTER_STEP, "wire", "Bytes sent and received in the round"),
    Plot("wire/bytes_up_total", "bytes_up_total", OUTER_STEP, "wire", "Bytes sent and received so far"),
    Plot("wire/bytes_down_total", "bytes_down_total", OUTER_STEP, "wire", "Bytes sent and received so far"),
    Plot("wire/bytes_per_token", "bytes_per_token", OUTER_STEP, "wire", "Bytes sent per token"),
    Plot("wire/payload_ratio", "payload_ratio", OUTER_STEP, "wire", "Compression (fp32 size / payload)"),
    Plot("members/accepted", "members", OUTER_STEP, "members", "Members accepted and excluded"),
    Plot("members/excluded", "excluded", OUTER_STEP, "members", "Members accepted and excluded"),
    Plot("members/reports", "reports", OUTER_STEP, "members", "Members' metrics received"),
    Plot("health/pseudo_gradient_norm", "pseudo_gradient_norm", OUTER_STEP, "health", "Pseudo-gradient norm"),
    Plot("health/momentum_norm", "momentum_norm", OUTER_STEP, "health", "Outer momentum norm"),
    Plot("health/divergences_total", "divergences_total", OUTER_STEP, "health", "Divergences so far"),
    Plot("health/rejections_total", "rejections_total", OUTER_STEP, "health", "Rejections so far"),
    Plot("health/audits_total", "audits_total", OUTER_STEP, "health", "Audits closed so far"),
    Plot("health/convictions_total", "convictions_total", OUTER_STEP, "health", "Nodes convicted so far"),
    Plot("health/refused_reports", "refused", OUTER_STEP, "health", "Members' metrics refused"),
)
"""The coordinator's W&B run: fields of :class:`RoundSummary`."""

STEP_PLOTS = (
    Plot("node/loss", "loss", INNER_STEP, "members", "Loss of single nodes", "min"),
    Plot("node/lr", "lr", INNER_STEP, "members", "Learning rate of single nodes"),
    Plot("node/tokens_per_second", "tokens_per_second", INNER_STEP, "members", "Tokens/s of single nodes"),
)
"""A node's own W&B run: fields of :class:`StepDone`."""

MEMBER_PLOTS = (
    Plot("node_round/train_loss", "train_loss", OUTER_STEP, "members", "Round loss of single nodes", "min"),
    Plot("node_round/train_seconds", "train_seconds", OUTER_STEP, "members", "Training time of single nodes (s)"),
    Plot("node_round/exchange_seconds", "exchange_seconds", OUTER_STEP, "members", "Exchange of single nodes (s)"),
    Plot("node_round/bytes_up", "bytes_up", OUTER_STEP, "members", "Bytes sent by single nodes"),
    Plot("node_round/bytes_down", "bytes_down", OUTER_STEP, "members", "Bytes received by single nodes"),
)
"""A node's own W&B run: fields of its :class:`MemberMetrics`."""

PLOTS = SWARM_PLOTS + STEP_PLOTS + MEMBER_PLOTS


def swarm_row(event: Event) -> dict[str, float]:
    """Return the row that the coordinator's W&B run logs for ``event``; empty for events that it does not log."""
    match event:
        case GenesisJudged(heldout_loss=loss) if loss is not None:
            return {OUTER_STEP: 0, TOKENS: 0, "heldout/loss": loss, "heldout_by_tokens/loss": loss}
        case RoundSummary():
            return {OUTER_STEP: event.round, TOKENS: event.tokens_total} | _row(event, SWARM_PLOTS)
        case _:
            return {}


def node_row(event: Event) -> dict[str, float]:
    """Return the row that a node's own W&B run logs for ``event``; empty for events that it does not log."""
    match event:
        case StepDone():
            return {INNER_STEP: event.global_step} | _row(event, STEP_PLOTS)
        case MemberMetrics() if event.peer == event.node:
            return {OUTER_STEP: event.round} | _row(event, MEMBER_PLOTS)
        case _:
            return {}


def _row(event: Event, plots: tuple[Plot, ...]) -> dict[str, float]:
    values = {plot.key: getattr(event, plot.field) for plot in plots}
    return {key: value for key, value in values.items() if value is not None}
