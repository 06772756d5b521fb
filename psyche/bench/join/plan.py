"""A run that is joined: how large its state is, how long its rounds are, and when in a round newcomers come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psyche.config import BpeTokenizer, CodecSpec, Config, Data, Deadlines, Inner, Model, Node, Rounds, Run, Wandb
from psyche.config.trust import Audits
from psyche.training.models import layout

BEFORE = 2
"""Rounds without a newcomer that are compared with those of a join."""
SKIPPED = 1
"""Rounds at the start that are not counted: connections are made, memory is touched for the first time."""
HIDDEN = 512
WHOLE = 10_000
"""Rounds of the run: more than are played."""
NEVER = 1_000
"""Rounds between checkpoints: one in five would be longer than the others, whoever joins."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    peers: int = 4
    """Donors."""
    parameters: int = 15_000_000
    """About as many; the state is 8 bytes each."""
    rate: int = 100_000_000
    """Bits a second of each link, either way."""
    at: Sequence[float] = (0.0, 0.8)
    """When newcomers come, one after the other: after which share of a round's inner steps."""
    step_seconds: float = 1.0
    """Of an inner step, on each node."""
    inner_steps: int = 30
    codec: str = "int8"


@dataclass(frozen=True)
class Trial:
    """The run of a plan."""

    plan: Plan
    config: Config
    parameters: int
    state_bytes: int
    """θ and m."""

    @property
    def line_seconds(self) -> float:
        """The state on the line, by its nominal rate."""
        return 8 * self.state_bytes / self.plan.rate


def trial(plan: Plan) -> Trial:
    """What is run for ``plan``. Raises ``PsycheError`` where the model cannot be built."""
    config = _config(plan)
    flat = layout(config.run.model)
    return Trial(plan, config, flat.parameters, 2 * 4 * flat.size)


def _config(plan: Plan) -> Config:
    """A Llama of short sequences: its state is large and a step of it cheap, as nothing but the line is to be slow."""
    vocabulary, inner = 512, 3 * HIDDEN
    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * inner
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": inner,
        "num_hidden_layers": max(1, round((plan.parameters - vocabulary * HIDDEN) / layer)),
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    run = Run(
        name="join",
        model=Model(settings=settings),
        data=Data(tokenizer=BpeTokenizer(vocab_size=vocabulary), sequence_length=16, max_documents=200),
        inner=Inner(batch_size=1, schedule="constant", warmup_steps=10),
        codec=CodecSpec(name=plan.codec),
        rounds=Rounds(total=WHOLE, inner_steps=plan.inner_steps, start_members=plan.peers),
        # Paced steps take so equally long that a deadline by what was seen lets nobody be late by half a second.
        deadlines=Deadlines(round_min=min(1800.0, max(20.0, 2 * plan.inner_steps * plan.step_seconds))),
        heldout_sequences=plan.peers,
        audits=Audits(rate=0.0),  # who audits sits out rounds, and rounds with and without a joiner are compared
    )
    node = Node(threads=1, device="cpu", checkpoint_every=NEVER, wandb=Wandb(mode="disabled"))
    return Config(run=run, node=node)
