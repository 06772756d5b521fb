"""Estimate what a run would cost from its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from psyche.config import Run
from psyche.exchange.cost import Cost, ExchangeSizes, sharded_from
from psyche.exchange.rules import fragments_of
from psyche.numerics.codecs.registry import codec
from psyche.telemetry.formatting import number, size
from psyche.training.memory import activation_bytes
from psyche.training.models import layout
from psyche.training.zero.zero_memory import STAGES, rank_bytes

SUSTAINED = 66e12
"""FLOP/s of an RTX 4090: 165 TFLOP/s of dense bf16 (NVIDIA's Ada whitepaper, appendix A), of which 40 % are
sustained."""

GPUS = 8
"""GPUs of the machine for which ZeRO's memory is estimated."""

LINES = {"100 Mbit/s": 100e6 / 8, "1 Gbit/s": 1e9 / 8}
"""Lines for which exchange times are estimated, in bytes a second: a good home line and a data centre."""


@dataclass(frozen=True)
class Costs:
    """Estimated counts and bytes, for one member unless stated otherwise."""

    parameters: int
    members: int
    engine_bytes: int
    """Tensors of TorchEngine: model, gradients, state of the inner optimizer; without activations."""
    zero_bytes: dict[int, int]
    """The same for each of ``GPUS`` ranks, by stage of ZeRO."""
    outer_bytes: int
    """Main memory for θ, the outer momentum, the error feedback, and at the end of a round the local parameters and all
    payloads."""
    activation_bytes: int
    """Activations of one sequence in bf16, estimated from the model's graph with fused attention."""
    checkpointed_bytes: int
    """The same with activation checkpointing."""
    payload_bytes: int
    """Payload of a round; the mean over fragments."""
    payload_ratio: float
    """Size in fp32 over size of the payload."""
    gather: Cost
    """Exchange of a round by gather; the mean over fragments."""
    sharded: Cost
    """The same if ``reducers`` nodes reduce each slice."""
    reducers: int
    sharded_from: int | None
    """Members from which rounds are sharded; None: never."""
    tokens_per_round: int
    """Tokens of a round, all members together."""
    tokens: int
    """Tokens of the run, all members together."""
    round_flops: float
    """FLOPs of a member's inner steps in a round, forward and backward."""
    overlap_share: float
    """Share of a round's inner steps that may overlap the previous round's exchange."""

    @property
    def exchange(self) -> Cost:
        """The exchange that the run would use."""
        shards = self.sharded_from is not None and self.members >= self.sharded_from
        return self.sharded if shards else self.gather

    @property
    def bytes_per_token(self) -> float:
        """Bytes sent by all members per token."""
        return self.members * self.exchange.up / self.tokens_per_round

    def utilisation(self, rate: float, flops: float) -> float:
        """Return the share of time that a member trains at ``flops`` FLOP/s with a line of ``rate`` bytes a second
        in each direction, if it waits for nothing else."""
        training = self.round_flops / flops
        waiting = max(0.0, self.exchange.seconds(rate, rate) - self.overlap_share * training)
        return training / (training + waiting)

    def lines(self, flops: float = SUSTAINED) -> Iterator[tuple[str, str]]:
        """Yield labels and values for people; ``flops`` is what a member sustains in FLOP/s."""
        yield "parameters", f"{self.parameters:,}"
        yield "members assumed", f"{self.members} (run.rounds.start_members)"
        yield "outer state", f"{size(self.outer_bytes)} of main memory"
        yield "TorchEngine", f"{size(self.engine_bytes)} of tensors"
        stages = ", ".join(f"ZeRO {stage} {size(count)}" for stage, count in self.zero_bytes.items())
        yield f"DeepSpeed, each of {GPUS} GPUs", stages
        kept = f"{size(self.activation_bytes)}, or {size(self.checkpointed_bytes)} with checkpointing"
        yield "activations per sequence", f"about {kept}"
        yield "payload", f"{size(self.payload_bytes)}, {self.payload_ratio:.2f}× smaller than fp32"
        yield "bytes per round and node", f"{size(self.exchange.up)} up, {size(self.exchange.down)} down"
        yield "exchange by gather", _described(self.gather)
        yield f"sharded, {self.reducers} reducers a slice", _described(self.sharded)
        yield "exchange used", self._taken()
        yield "tokens per round", f"{self.tokens_per_round:,}"
        yield "tokens", f"{self.tokens:,} ({self.tokens / self.parameters:.1f} per parameter)"
        yield "bytes per token", f"{self.bytes_per_token:.2f}"
        yield "training per round", f"{self.round_flops / flops:,.0f} s at {flops / 1e12:g} TFLOP/s sustained"
        shares = (f"{100 * self.utilisation(rate, flops):.1f} % at {line}" for line, rate in LINES.items())
        yield "expected utilisation", ", ".join(shares)

    def _taken(self) -> str:
        if self.sharded_from is None:
            return "gather"
        if self.members >= self.sharded_from:
            return f"sharded (from {self.sharded_from} members on)"
        return f"gather (sharded from {self.sharded_from} members on)"


def _described(cost: Cost) -> str:
    times = ", ".join(f"{_seconds(cost.seconds(rate, rate))} at {line}" for line, rate in LINES.items())
    return f"{size(cost.up)} each way: {times}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{number(seconds, '.2g')} s"


def costs_of(run: Run) -> Costs:
    """Estimate the costs of ``run``. Builds the model without allocating it; raises ``ConfigError`` if it cannot."""
    flat = layout(run.model)
    encoder, result = codec(run.codec.name), codec(run.result_codec)
    fragments = fragments_of(run, flat)
    counts = [[part.stop - part.start for part in parts] for parts in fragments]
    whole = sum(encoder.expected_bytes(count) for one in counts for count in one)
    payload = round(whole / len(fragments))
    members, reducers = run.rounds.start_members, run.exchange.reducers
    shapes = [ExchangeSizes.of(encoder, result, one) for one in counts]
    outer_copies = 3 + encoder.error_feedback  # θ, m, the local parameters; error feedback
    inner_copies = 4 if run.inner.optimizer == "adamw" else 3  # model, gradient, and two moments (Muon: mostly one)
    per_round = members * run.rounds.inner_steps * run.tokens_per_step
    return Costs(
        parameters=flat.parameters,
        members=members,
        engine_bytes=4 * flat.size * inner_copies,
        zero_bytes={stage: rank_bytes(flat.size, stage, GPUS, offload=False).device for stage in STAGES},
        outer_bytes=4 * flat.size * outer_copies + payload * members,
        activation_bytes=activation_bytes(run.model, run.data.sequence_length, recompute=False),
        checkpointed_bytes=activation_bytes(run.model, run.data.sequence_length, recompute=True),
        payload_bytes=payload,
        payload_ratio=4 * flat.parameters / whole,
        gather=_mean([one.gather(members) for one in shapes]),
        sharded=_mean([one.sharded(members, reducers) for one in shapes]),
        reducers=reducers,
        sharded_from=sharded_from(run, fragments),
        tokens_per_round=per_round,
        tokens=per_round * run.rounds.total,
        round_flops=flops_per_token(run, flat.parameters) * run.rounds.inner_steps * run.tokens_per_step,
        overlap_share=run.overlap.overlap_steps / run.rounds.inner_steps,
    )


def flops_per_token(run: Run, parameters: int) -> float:
    """Return FLOPs of forward and backward per token: 6 per parameter, plus 12 × layers × width × context for attention
    (PaLM, arXiv 2204.02311, appendix B). Settings without layers or width count as without attention."""
    settings = run.model.settings
    attention = settings.get("num_hidden_layers", 0) * settings.get("hidden_size", 0) * run.data.sequence_length
    return 6.0 * parameters + 12.0 * float(attention)


def _mean(costs: list[Cost]) -> Cost:
    return Cost(round(fmean(cost.up for cost in costs)), round(fmean(cost.down for cost in costs)))
