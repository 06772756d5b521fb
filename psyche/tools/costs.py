"""What a run would cost, from its configuration alone."""

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
"""Of an RTX 4090: 165 TFLOP/s of dense bf16 (NVIDIA's Ada whitepaper, appendix A), 40 % of it in use."""

GPUS = 8
"""Of the machine for which ZeRO is worked out."""

LINES = {"100 Mbit/s": 100e6 / 8, "1 Gbit/s": 1e9 / 8}
"""Lines for which a round's exchange is worked out, in bytes a second: a home's and a data centre's cheapest."""


@dataclass(frozen=True)
class Costs:
    """Counts and bytes; for one member unless it says otherwise."""

    parameters: int
    members: int
    engine_bytes: int
    """Of TorchEngine: the model, its gradients, the inner optimizer's state. Activations come on top."""
    zero_bytes: dict[int, int]
    """The same of each of ``GPUS`` ranks, by the stage of ZeRO."""
    outer_bytes: int
    """θ and m, the error-feedback buffer, and at the end of a round the local copy and the payloads of all members: in
    the machine's memory."""
    activation_bytes: int
    """Of one sequence in bf16, as estimated from the model's graph with fused attention."""
    checkpointed_bytes: int
    """The same where activations are computed twice."""
    payload_bytes: int
    """Of a round; the mean where rounds exchange fragments."""
    payload_ratio: float
    gather: Cost
    """Of a round, where everybody fetches every payload; the mean where rounds exchange fragments."""
    sharded: Cost
    """The same where ``reducers`` nodes add up each slice for all."""
    reducers: int
    sharded_from: int | None
    """Members from which the run shards; None: however many there are, it does not."""
    tokens_per_round: int
    """All members together."""
    tokens: int
    """The whole run, all members together."""
    round_flops: float
    """Of a member's inner steps in a round, forward and backward."""
    late_share: float
    """Of a round's inner steps, those that may be taken while the round before is on the wire."""

    @property
    def exchange(self) -> Cost:
        """Of a round, the way that the run takes it."""
        shards = self.sharded_from is not None and self.members >= self.sharded_from
        return self.sharded if shards else self.gather

    @property
    def bytes_per_token(self) -> float:
        """Sent by all members, per token of training."""
        return self.members * self.exchange.up / self.tokens_per_round

    def utilisation(self, rate: float, flops: float) -> float:
        """The share of its time that a member trains: at ``rate`` bytes a second either way and ``flops`` a second,
        where nothing but its line and its processor is waited for."""
        training = self.round_flops / flops
        waiting = max(0.0, self.exchange.seconds(rate, rate) - self.late_share * training)
        return training / (training + waiting)

    def lines(self, flops: float = SUSTAINED) -> Iterator[tuple[str, str]]:
        """Label and value, for people; ``flops`` a second is what a member sustains."""
        yield "parameters", f"{self.parameters:,}"
        yield "members assumed", f"{self.members} (run.rounds.start_members)"
        yield "outer state", f"{size(self.outer_bytes)} of the machine's memory"
        yield "TorchEngine", f"{size(self.engine_bytes)} of tensors"
        stages = ", ".join(f"ZeRO {stage} {size(count)}" for stage, count in self.zero_bytes.items())
        yield f"DeepSpeed, each of {GPUS} GPUs", stages
        kept = f"{size(self.activation_bytes)}, or {size(self.checkpointed_bytes)} computed twice"
        yield "activations of a sequence", f"about {kept}"
        yield "payload", f"{size(self.payload_bytes)}, {self.payload_ratio:.2f}× smaller than fp32"
        yield "bytes per round and node", f"{size(self.exchange.up)} up, {size(self.exchange.down)} down"
        yield "exchange by gather", _described(self.gather)
        yield f"by {self.reducers} reducers a slice", _described(self.sharded)
        yield "exchange taken", self._taken()
        yield "tokens per round", f"{self.tokens_per_round:,}"
        yield "tokens", f"{self.tokens:,} ({self.tokens / self.parameters:.1f} per parameter)"
        yield "bytes per token", f"{self.bytes_per_token:.2f}"
        yield "computing per round", f"{self.round_flops / flops:,.0f} s at {flops / 1e12:g} TFLOP/s sustained"
        shares = (f"{100 * self.utilisation(rate, flops):.1f} % at {line}" for line, rate in LINES.items())
        yield "expected utilisation", ", ".join(shares)

    def _taken(self) -> str:
        if self.sharded_from is None:
            return "gather"
        if self.members >= self.sharded_from:
            return f"sharded, with {self.sharded_from} members or more"
        return f"gather; sharded from {self.sharded_from} members on"


def _described(cost: Cost) -> str:
    times = ", ".join(f"{number(cost.seconds(rate, rate), '.2g')} s at {line}" for line, rate in LINES.items())
    return f"{size(cost.up)} each way: {times}"


def costs_of(run: Run) -> Costs:
    """Work the costs out. Builds the model without allocating it. Raises ``ConfigError`` where it cannot be built."""
    flat = layout(run.model)
    encoder, result = codec(run.codec.name), codec(run.result_codec)
    fragments = fragments_of(run, flat)
    counts = [[part.stop - part.start for part in parts] for parts in fragments]
    whole = sum(encoder.expected_bytes(count) for one in counts for count in one)
    payload = round(whole / len(fragments))
    members, reducers = run.rounds.start_members, run.exchange.reducers
    shapes = [ExchangeSizes.of(encoder, result, one) for one in counts]
    outer_copies = 3 + encoder.error_feedback  # θ, m, the local copy; and the residual where there is error feedback
    inner_copies = 4 if run.inner.optimizer == "adamw" else 3  # model, gradient, and two moments or (most) one
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
        late_share=run.overlap.overlap_steps / run.rounds.inner_steps,
    )


def flops_per_token(run: Run, parameters: int) -> float:
    """Forward and backward: 6 a parameter, and 12 for each layer, direction and token in sight, for attention (PaLM,
    arXiv 2204.02311, appendix B). Settings without layers or width are taken to have no attention."""
    settings = run.model.settings
    attention = settings.get("num_hidden_layers", 0) * settings.get("hidden_size", 0) * run.data.sequence_length
    return 6.0 * parameters + 12.0 * float(attention)


def _mean(costs: list[Cost]) -> Cost:
    return Cost(round(fmean(cost.up for cost in costs)), round(fmean(cost.down for cost in costs)))
