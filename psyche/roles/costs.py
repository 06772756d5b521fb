"""What a run would cost, from its configuration alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from psyche.config import Run
from psyche.numerics.codecs.registry import codec
from psyche.roles.rules import fragments_of
from psyche.telemetry.wording import size
from psyche.training.models import layout


@dataclass(frozen=True)
class Costs:
    """Counts and bytes; for one member unless it says otherwise."""

    parameters: int
    members: int
    tensor_bytes: int
    """θ and m, the model, its gradients, AdamW's two moments, the error-feedback buffer, and at the end of a round
    the local copy and the payloads of all members. Activations come on top and depend on the micro-batch."""
    payload_bytes: int
    """Of a round; the mean where rounds exchange fragments."""
    payload_ratio: float
    up_bytes: int
    """A round, with gather: this node's payload to everybody else."""
    down_bytes: int
    tokens_per_round: int
    """All members together."""
    tokens: int
    """The whole run, all members together."""
    bytes_per_token: float
    """Sent by all members, per token of training."""

    def lines(self) -> Iterator[tuple[str, str]]:
        """Label and value, for people."""
        yield "parameters", f"{self.parameters:,}"
        yield "members assumed", f"{self.members} (run.rounds.start_members)"
        yield "memory per node", f"{size(self.tensor_bytes)} of tensors, and activations"
        yield "payload", f"{size(self.payload_bytes)}, {self.payload_ratio:.2f}× smaller than fp32"
        yield "bytes per round and node", f"{size(self.up_bytes)} up, {size(self.down_bytes)} down"
        yield "tokens per round", f"{self.tokens_per_round:,}"
        yield "tokens", f"{self.tokens:,} ({self.tokens / self.parameters:.1f} per parameter)"
        yield "bytes per token", f"{self.bytes_per_token:.2f}"


def costs_of(run: Run) -> Costs:
    """Work the costs out. Builds the model without allocating it. Raises ``ConfigError`` where it cannot be built."""
    flat = layout(run.model)
    encoder = codec(run.codec.name)
    fragments = fragments_of(run, flat)
    whole = sum(encoder.expected_bytes(part.stop - part.start) for parts in fragments for part in parts)
    payload = round(whole / len(fragments))
    members = run.rounds.start_members
    # θ, m, model, gradient, two moments, local copy; and the residual where there is error feedback
    copies = 7 + encoder.error_feedback
    per_round = members * run.rounds.inner_steps * run.tokens_per_step
    up = payload * (members - 1)
    return Costs(
        parameters=flat.parameters,
        members=members,
        tensor_bytes=4 * flat.size * copies + payload * members,
        payload_bytes=payload,
        payload_ratio=4 * flat.parameters / whole,
        up_bytes=up,
        down_bytes=up,
        tokens_per_round=per_round,
        tokens=per_round * run.rounds.total,
        bytes_per_token=members * up / per_round,
    )
