"""The ``run:`` section: how a run trains and exchanges, equal on all nodes."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from psyche.config.base import Count, Fraction, NonNegative, PeerId, Positive, Seconds, Strict
from psyche.config.data_config import BpeTokenizer, Data
from psyche.numerics.codecs.registry import CODECS

if TYPE_CHECKING:
    from psyche.numerics.outer import OuterSettings


MAX_POINTS = 4096
"""Most trace points of a round: what the message of an audit bundle has room for."""
Share = Annotated[float, Field(gt=0.0, le=1.0)]


class Model(Strict):
    """A causal language model of ``transformers``."""

    architecture: str = "llama"
    """``model_type`` of a ``transformers`` configuration, such as ``llama``, ``qwen3`` or ``gpt2``. Default:
    DiLoCo-like models are usually written as Llama."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that architecture's configuration class. ``vocab_size`` is required; the rest defaults to the
    class."""

    @model_validator(mode="after")
    def _plain(self) -> Self:
        for name, value in self.settings.items():
            if not _is_plain(value):
                raise ValueError(
                    f"settings.{name}: only numbers, strings, true, false, null, and lists and maps of these"
                )
        size = self.settings.get("vocab_size", 1)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"settings.vocab_size: {size!r} is not a whole number above 0")
        return self

    @property
    def vocab_size(self) -> int:
        """The model's vocabulary size; 0 if the settings do not give it."""
        return int(self.settings.get("vocab_size", 0))


def _is_plain(value: object, depth: int = 8) -> bool:
    """Return whether a value has a single encoding in a manifest and bounded depth. Manifests come from other
    machines."""
    match value:
        case None | bool() | float() | str():
            return True
        case int():
            return -(2**63) <= value < 2**63
        case list():
            return depth > 0 and all(_is_plain(one, depth - 1) for one in value)
        case dict():
            return depth > 0 and all(isinstance(k, str) and _is_plain(one, depth - 1) for k, one in value.items())
        case _:
            return False


def _default_error_feedback(codec: str) -> float:
    return CODECS[codec].error_feedback if codec in CODECS else 1.0  # an unknown name is rejected afterwards


class CodecSpec(Strict):
    """How pseudo-gradients are encoded."""

    name: str = "int8"
    """One of ``numerics/codecs/registry.py``: ``fp32``, ``int8``, ``int4``, ``int4-32``, ``int2``, ``topk2``,
    ``topk2e``, or a sparse one with a density, such as ``topk2-256``. Default: no loss measured against fp32 at a
    quarter of its bytes."""
    error_feedback: float = Field(default_factory=lambda data: _default_error_feedback(data["name"]), ge=0.0, le=1.0)
    """Decay β of the error-feedback buffer: e ← β·e + Δ before encoding. Default: 1 for dense codecs, 0.95 for
    sparse ones (SparseLoCo, arXiv 2508.15706)."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.name not in CODECS:
            raise ValueError(f"codec {self.name!r} is unknown; this version has {', '.join(CODECS)}")
        return self


InnerOptimizer = Literal["adamw", "muon"]


class Inner(Strict):
    """The inner optimizer. Defaults: DiLoCo (arXiv 2311.08105, table 5); β₂ and clip from arXiv 2503.09799."""

    optimizer: InnerOptimizer = "adamw"
    """``adamw``, or ``muon``: Muon for the matrices between the embeddings and AdamW for the rest (MuLoCo, arXiv
    2505.23725). Default: DiLoCo's."""
    lr: Positive = 4e-4
    """Peak learning rate. Default: DiLoCo's for 150M parameters."""
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.99), strict=False)
    """β₁ and β₂ of AdamW. Default: β₂ of arXiv 2503.09799."""
    eps: Positive = 1e-8
    """ε of AdamW. Default: PyTorch's."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of matrices; vectors have none. Default: DiLoCo's."""
    clip: Positive | None = 1.0
    """Maximum L2 norm of the gradient; ``null``: no clipping. Default: arXiv 2503.09799."""
    batch_size: Count = 8
    """Sequences per inner step and node. Default: for small tests; DiLoCo has 512."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up: ``cosine`` down to ``final_lr``, ``wsd`` (constant, then linear decay), or
    ``constant``. Default: DiLoCo's."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps of linear warm-up at the start of the run. Default: for small tests; DiLoCo has 1000."""
    fresh_warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Warm-up steps of a new node's empty optimizer after the run's own warm-up, at most ``warmup_steps``. Default:
    (1 + β₁)/(1 − β₁), derived in ``training/schedules.py``."""
    final_lr: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Share of ``lr`` left at the end of a cosine or WSD schedule. Default: the usual tenth."""
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """WSD only: share of all steps over which ``lr`` decays at the end. Default: the upper end of MiniCPM's 10 to 20 %
    (arXiv 2404.06395)."""


class Outer(Strict):
    """The outer optimizer: SGD with Nesterov momentum on pseudo-gradients. Defaults: DiLoCo (arXiv 2311.08105, §3)."""

    lr: Positive = 0.7
    """Outer learning rate. Sparse codecs need about 2. Default: DiLoCo's."""
    momentum: Fraction = 0.9
    """Nesterov momentum. Runs of fewer than hundreds of rounds, and sparse codecs, need less. Default: DiLoCo's."""

    @property
    def settings(self) -> OuterSettings:
        """The settings as the outer step takes them."""
        from psyche.numerics.outer import OuterSettings  # here: it imports torch, which reading a file does not need

        return OuterSettings(**self.model_dump())


class Deadlines(Strict):
    """Bounds of the adaptive deadlines, in seconds: a deadline is the median plus 5 MADs of recent times. Defaults:
    chosen for rounds of minutes; raise the upper bounds for longer rounds."""

    round_min: Seconds = 20.0
    """Shortest time for the inner steps of a round. Default: delays of a busy machine do not cut off a node."""
    round_max: Seconds = 1800.0
    """Longest time for the inner steps of a round; also the limit of the first round. Default: half an hour."""
    exchange_min: Seconds = 10.0
    """Shortest time for a stage of the exchange. Default: as for ``round_min``."""
    exchange_max: Seconds = 600.0
    """Longest time for a stage of the exchange; raise it for slow lines. Default: 10 minutes."""
    silence: Seconds = 15.0
    """Time without a message after which a member counts as gone. Default: nodes call their
    coordinator every 4 s at least."""
    lease: Seconds = 15.0
    """Time without a leader after which a standby coordinator takes over. Default: as for ``silence``."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.round_min > self.round_max:
            raise ValueError(f"round_min ({self.round_min}) is above round_max ({self.round_max})")
        if self.exchange_min > self.exchange_max:
            raise ValueError(f"exchange_min ({self.exchange_min}) is above exchange_max ({self.exchange_max})")
        return self


class ExchangeSpec(Strict):
    """How payloads reach all nodes."""

    kind: Literal["auto", "gather", "sharded"] = "auto"
    """``gather``: every node fetches every payload. ``sharded``: reducers add up each slice. ``auto``: sharded once
    it takes half the bytes of gather for the present number of members (``exchange/cost.py``). Default: gather needs
    no trust."""
    reducers: Count = 2
    """Sharded only: nodes that reduce each slice. Default: 2, the fewest that can contradict each other; with 1 a wrong
    result goes unnoticed."""


class Overlap(Strict):
    """Training while pseudo-gradients are exchanged.

    With the defaults, training waits for the exchange.
    """

    fragments: Count = 1
    """Groups of layers (strided) that are exchanged in turn, one per round. A parameter is synchronised every
    ``fragments × rounds.inner_steps`` steps, the H of Streaming DiLoCo (arXiv 2501.18512). Default: the whole model."""
    overlap_steps: Annotated[int, Field(ge=0)] = 0
    """Inner steps of a round that a node may take before it knows the previous outer step; at most
    ``rounds.inner_steps``. Default: none."""


class Aggregation(Strict):
    """How pseudo-gradients are combined when some senders are dishonest."""

    kind: Literal["mean", "norm_clip"] = "norm_clip"
    """``norm_clip`` clips each payload slice to the median norm: see ``numerics/aggregate.py``."""
    max_share: Share = 0.25
    """Largest share of an outer step's weight that one node may have; with few contributors, twice an equal share."""


class Audits(Strict):
    """How contributions are checked: other nodes replay some of them."""

    rate: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    """Probability that a contribution is audited; higher for new nodes. 0: no audits. Default: 5 % more computing; with
    ``window`` it makes cheating unprofitable."""
    trace_steps: Count | None = None
    """Inner steps between trace points, the states that a node commits to. Each segment is replayed on its own,
    which detects smaller deviations, and each point takes 12 bytes of disk per parameter. Default: start and end of
    a round."""
    window: Count = 20
    """Rounds in which a contribution can be challenged and its credit stays pending; at least (1 − rate) / rate, or
    cheating would pay. Default: that bound for the default rate, rounded up."""
    pass_error: Positive = 0.02
    """Largest relative replay error that passes. ``psyche audit calibrate``
    measures it for a model. Default: for small models."""
    fail_error: Positive = 0.04
    """Smallest relative replay error that fails; above ``pass_error``. Default: twice ``pass_error``."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.pass_error >= self.fail_error:
            raise ValueError(f"pass_error ({self.pass_error}) is not below fail_error ({self.fail_error})")
        if self.rate and self.window < (needed := ceil((1 - self.rate) / self.rate)):
            raise ValueError(
                f"window ({self.window}) is below (1 − rate) / rate: with fewer than {needed} rounds of pending "
                "credit, cheating pays more than a conviction costs; raise either"
            )
        return self


class Federated(Strict):
    """Contributions from private data (federated mode). Absent: the run accepts none.

    The clipping norm is fixed for all nodes: one that followed the data would leak information about it.
    """

    clip: Positive
    """L2 norm to which a node clips its pseudo-gradient before it adds noise in proportion to this norm. No default:
    use the median norm of pseudo-gradients of the same model on public data (Andrew et al., arXiv 1905.03871, §3)."""
    max_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    """Largest share of an outer step's weight that all unaudited contributions have together; 1: no limit. Default:
    as for ``aggregation.max_share``."""


class Rounds(Strict):
    """The number of rounds, their length, and the members they need."""

    total: Count = 100
    """Rounds of the run. Default: for small tests."""
    inner_steps: Count = 100
    """H: inner steps per round. Default: INTELLECT-1's (arXiv 2412.01152); DiLoCo has 500."""
    start_members: Count = 1
    """Members that must be present before the first round. Default: a run starts with its first node."""
    min_members: Count = 1
    """Members that every later round needs; with fewer the run pauses. At most ``start_members``. Default: any node
    can go on alone."""
    probation: Annotated[int, Field(ge=0)] = 3
    """Accepted contributions that a new node needs before it has a vote. Members of the first round vote at once.
    Default: chosen so that a vote costs work."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_members > self.start_members:
            raise ValueError(f"min_members ({self.min_members}) is above start_members ({self.start_members})")
        return self


class Run(Strict):
    """Everything that must be equal on all nodes. Its hash, with what the launch resolves, is the run id."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Name of the run: letters, digits, ``.``, ``_`` and ``-``; at most 64. No default."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial parameters and of the order of the data. Default: arbitrary."""
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
    deadlines: Deadlines = Deadlines()
    standbys: Annotated[tuple[PeerId, ...], Field(strict=False, max_length=15)] = ()
    """PeerIDs of standby coordinators, in the order in which they take over; ``psyche key`` prints a PeerID. Default:
    none."""
    heldout_sequences: Count = 64
    """Held-out sequences on which θ is evaluated after each round. Default: chosen to take less time than a few
    steps."""

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
