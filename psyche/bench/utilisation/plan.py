"""Runs whose exchange takes a given share of their computing, and the ways to train meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal

from psyche.config import (
    BpeTokenizer,
    Config,
    Data,
    Inner,
    Model,
    Node,
    Overlap,
    Rounds,
    Run,
    Wandb,
    load_config,
)
from psyche.config.trust import Audits
from psyche.errors import PsycheError
from psyche.exchange.cost import Shapes, sharded_from
from psyche.numerics.codecs.registry import codec
from psyche.training.models import layout

Way = Literal["none", "tail", "fragments"]
WAYS: tuple[Way, ...] = ("none", "tail", "fragments")
FRAGMENTS = 2
SLACK = 2.0
"""Late steps allowed, over those that the bytes alone take at full rate: lines are shared and voting comes on top; an
exchange of 4 nodes took 1.7 times as long."""
SKIPPED = 2
"""Rounds at the start that are not counted: connections are made, deadlines found."""
LAST = 1
"""Nor is the last round, which has no next one to train for while it is on the wire."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    peers: int
    ratio: float
    """Seconds on the wire over seconds of computing, of a round without overlap."""
    rate: int | None = None
    """Bits a second of each link. None: as many as make the exchange last ``ratio`` of a round's computing."""
    ways: Sequence[Way] = WAYS
    rounds: int = 6
    """Counted ones."""
    step_seconds: float = 0.2
    """Of an inner step, on each node."""
    inner_steps: int = 40
    """H without fragments. Where ``rate`` is given, it is chosen instead, so that ``ratio`` holds."""
    config: Path | None = None
    """A run to take model, data and codec from; a small one where None."""


@dataclass(frozen=True)
class Trial:
    """One run."""

    way: Way
    config: Config
    rate: int
    """Bits a second of each link."""
    step_seconds: float
    parameters: int


def trials(plan: Plan) -> list[Trial]:
    """The runs of ``plan``. Raises :class:`PsycheError` where the configuration cannot be used."""
    config = small_config() if plan.config is None else load_config(plan.config)
    moved = exchange_bytes(config.run, plan.peers)
    rate, steps = plan.rate, plan.inner_steps
    if rate is None:
        rate = round(8 * moved / (plan.ratio * steps * plan.step_seconds))
    else:
        steps = max(1, round(8 * moved / rate / (plan.ratio * plan.step_seconds)))
    parameters = layout(config.run.model).parameters
    return [Trial(way, _with(config, plan, way, steps), rate, plan.step_seconds, parameters) for way in plan.ways]


def exchange_bytes(run: Run, peers: int) -> int:
    """What a peer sends, and receives, where the whole model is exchanged at once."""
    whole = layout(run.model).fragments(1)
    shapes = Shapes.of(codec(run.codec.name), codec(run.result_codec), [p.stop - p.start for p in whole[0]])
    first = sharded_from(run, whole)
    sharded = first is not None and peers >= first
    return (shapes.sharded(peers, run.exchange.reducers) if sharded else shapes.gather(peers)).up


def overlap(way: Way, steps: int, ratio: float) -> tuple[Overlap, int]:
    """The setting, and inner steps a round, so that each parameter is synchronised every ``steps`` steps or so."""
    fragments = FRAGMENTS if way == "fragments" else 1
    each = max(1, steps // fragments)
    late = 0 if way == "none" else min(each, ceil(SLACK * ratio * each) + 1)
    return Overlap(fragments=fragments, overlap_steps=late), each


def small_config() -> Config:
    """A Llama of 0.9M parameters: large enough for an exchange to be more than its control messages."""
    settings: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    data = Data(tokenizer=BpeTokenizer(vocab_size=512), sequence_length=32)
    inner = Inner(lr=2e-3, batch_size=2, schedule="constant", warmup_steps=10)
    run = Run(
        name="utilisation",
        model=Model(settings=settings),
        data=data,
        inner=inner,
        heldout_sequences=4,
        audits=Audits(rate=0.0),  # an auditor's step is none of training, and the question is what the wire costs
    )
    return Config(run=run, node=Node(threads=1, device="cpu", wandb=Wandb(mode="disabled")))


def _with(config: Config, plan: Plan, way: Way, steps: int) -> Config:
    setting, each = overlap(way, steps, plan.ratio)
    total = (plan.rounds + SKIPPED) * setting.fragments + LAST
    rounds = Rounds(total=total, inner_steps=each, start_members=plan.peers, min_members=config.run.rounds.min_members)
    run = config.run.model_copy(update={"rounds": rounds, "overlap": setting})
    return config.model_copy(update={"run": run})


def only(plan: Plan, names: Sequence[str]) -> Plan:
    """``plan`` with the ways named. Raises :class:`PsycheError` for a name that does not exist."""
    if unknown := [name for name in names if name not in WAYS]:
        raise PsycheError(f"--overlap {unknown[0]}: there is none of that name; there are {', '.join(WAYS)}")
    return replace(plan, ways=tuple(way for way in WAYS if way in names) or WAYS)
