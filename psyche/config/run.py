"""How a run trains and exchanges: the part of a configuration that is equal on all nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from psyche.config.base import Count, Fraction, NonNegative, PeerId, Positive, Seconds, Strict
from psyche.config.data import BpeTokenizer, Data
from psyche.config.model import Model
from psyche.config.trust import MAX_POINTS, Aggregation, Audits
from psyche.numerics.codecs.registry import CODECS

if TYPE_CHECKING:
    from psyche.numerics.outer import OuterSettings


def _default_error_feedback(codec: str) -> float:
    return CODECS[codec].error_feedback if codec in CODECS else 1.0  # an unknown name is rejected afterwards


class CodecSpec(Strict):
    """How pseudo-gradients are encoded.

    ``error_feedback`` is β of DESIGN §5: 1 is plain error feedback, and left out it is what the codec is made for.
    """

    name: str = "int8"
    error_feedback: float = Field(default_factory=lambda data: _default_error_feedback(data["name"]), ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.name not in CODECS:
            raise ValueError(f"codec {self.name!r} is unknown; this version has {', '.join(CODECS)}")
        return self


InnerOptimizer = Literal["adamw", "muon"]


class Inner(Strict):
    """What each node trains with. Defaults are DiLoCo's (arXiv 2311.08105, table 5) with β₂ and clip of 2503.09799."""

    optimizer: InnerOptimizer = "adamw"
    """``muon``: Muon for the matrices between the embeddings, AdamW for the rest (MuLoCo, arXiv 2505.23725)."""
    lr: Positive = 4e-4
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.99), strict=False)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    clip: Positive | None = 1.0
    batch_size: Count = 8
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    fresh_warmup_steps: Annotated[int, Field(ge=0)] = 20
    """First steps of an optimizer without state, on a node that joins later than the run's own warm-up; never more than
    ``warmup_steps``. The default is (1 + β₁)/(1 − β₁): ``schedules.py`` says why."""
    final_lr: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Share of ``lr`` left at the end of a cosine or WSD schedule."""
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """WSD only: the share of all steps over which the lr decays at the end."""


class Outer(Strict):
    """SGD with Nesterov momentum on pseudo-gradients. Defaults are DiLoCo's (arXiv 2311.08105, §3)."""

    lr: Positive = 0.7
    momentum: Fraction = 0.9

    @property
    def settings(self) -> OuterSettings:
        """The settings as the outer step takes them."""
        from psyche.numerics.outer import OuterSettings  # here: it imports torch, which reading a file does not need

        return OuterSettings(**self.model_dump())


class Deadlines(Strict):
    """Bounds in seconds. Within them a deadline is the median plus 5 MADs of the times observed recently."""

    round_min: Seconds = 20.0
    round_max: Seconds = 1800.0
    exchange_min: Seconds = 10.0
    exchange_max: Seconds = 600.0
    silence: Seconds = 15.0
    """A member not heard from for this long is counted as gone."""
    lease: Seconds = 15.0
    """A standby coordinator takes over when it has heard of no leader for this long."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.round_min > self.round_max:
            raise ValueError(f"round_min ({self.round_min}) is above round_max ({self.round_max})")
        if self.exchange_min > self.exchange_max:
            raise ValueError(f"exchange_min ({self.exchange_min}) is above exchange_max ({self.exchange_max})")
        return self


class ExchangeSpec(Strict):
    """How payloads reach everyone (DESIGN §7)."""

    kind: Literal["auto", "gather", "sharded"] = "auto"
    """``auto`` is sharded where that takes half the bytes for as many members as there are: ``exchange/cost.py``."""
    reducers: Count = 2
    """Sharded: nodes that add up each slice. One has nobody to contradict it: its results are believed unproven."""


class Overlap(Strict):
    """Training that goes on while pseudo-gradients are on the wire (DESIGN §7).

    The model is exchanged in ``fragments`` (strided groups of layers), one each round, so that a parameter is
    synchronised every ``fragments × rounds.inner_steps`` steps, which is the H of Streaming DiLoCo (arXiv 2501.18512).
    A node takes up to ``overlap_steps`` of a round's inner steps before the outer step of the round before is known.
    Without either, training waits for the exchange.
    """

    fragments: Count = 1
    overlap_steps: Annotated[int, Field(ge=0)] = 0


class Federated(Strict):
    """That nodes may train on data of their own, which stay where they are (DESIGN §9), and what this counts.

    Both are fixed for all: a clipping norm that followed the data would say something of them.
    """

    clip: Positive
    """L2 norm that a node's pseudo-gradient is clipped to before noise in proportion to it is added. The median of what
    they have is a good one (Andrew et al., arXiv 1905.03871, §3); ``psyche report`` shows that of a public run."""
    max_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    """Of an outer step's weight, the most that such contributions have together. 1: they count like any other."""


class Rounds(Strict):
    """How many rounds, of how many inner steps (H), among how many members."""

    total: Count = 100
    inner_steps: Count = 100
    start_members: Count = 1
    """Members that must be there before the first round."""
    min_members: Count = 1
    """Members without which no later round opens: with fewer, the run pauses and says for whom it waits."""
    probation: Annotated[int, Field(ge=0)] = 3
    """Accepted contributions of a newcomer before it has a vote. Those who begin a run have one at once."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_members > self.start_members:
            raise ValueError(f"min_members ({self.min_members}) is above start_members ({self.start_members})")
        return self


class Run(Strict):
    """The part of a configuration that is equal on all nodes, as a researcher writes it."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    model: Model
    data: Data = Data()
    codec: CodecSpec = CodecSpec()
    inner: Inner = Inner()
    outer: Outer = Outer()
    rounds: Rounds = Rounds()
    exchange: ExchangeSpec = ExchangeSpec()
    overlap: Overlap = Overlap()
    aggregation: Aggregation = Aggregation()
    audits: Audits = Audits()
    federated: Federated | None = None
    """None: the run takes no contributions from private data."""
    deadlines: Deadlines = Deadlines()
    standbys: Annotated[tuple[PeerId, ...], Field(strict=False, max_length=15)] = ()
    """PeerIDs of coordinators that take over, in this order, when the one that launches the run is gone."""
    heldout_sequences: Count = 64
    """Sequences of the held-out split on which the outer parameters are judged after each round."""

    @model_validator(mode="after")
    def _late(self) -> Self:
        if self.overlap.overlap_steps > self.rounds.inner_steps:
            raise ValueError(
                f"overlap.overlap_steps ({self.overlap.overlap_steps}) is above rounds.inner_steps "
                f"({self.rounds.inner_steps}): a round has no more steps to take early"
            )
        return self

    @model_validator(mode="after")
    def _traced(self) -> Self:
        every = self.audits.trace_steps
        if every is not None and self.rounds.inner_steps > every * (MAX_POINTS - 2):
            raise ValueError(
                f"audits.trace_steps ({every}) makes more than {MAX_POINTS} trace points of a round's "
                f"{self.rounds.inner_steps} inner steps: raise it"
            )
        return self

    @model_validator(mode="after")
    def _vocabulary(self) -> Self:
        wanted = self.data.tokenizer
        if not self.model.vocab_size:
            raise ValueError("model.settings.vocab_size is missing")
        if isinstance(wanted, BpeTokenizer) and self.model.vocab_size < wanted.vocab_size:
            raise ValueError(
                f"model.settings.vocab_size ({self.model.vocab_size}) is smaller than "
                f"data.tokenizer.vocab_size ({wanted.vocab_size})"
            )
        return self

    @property
    def private_share(self) -> float:
        """The most weight that contributions from private data have together; 0 where none are taken."""
        return 0.0 if self.federated is None else self.federated.max_share

    @property
    def result_codec(self) -> str:
        """The codec of a sharded round's aggregates."""
        return CODECS[self.codec.name].result_codec

    @property
    def total_steps(self) -> int:
        """Inner steps of one member over the whole run."""
        return self.rounds.total * self.rounds.inner_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one inner step of one member."""
        return self.inner.batch_size * self.data.sequence_length
