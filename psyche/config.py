"""Configuration: what a researcher writes, what every node must agree on, and what a node decides alone.

A configuration file has two parts. ``run:`` fixes everything that must be equal on all nodes; launched, it
becomes the *run manifest* (:class:`Manifest`), whose hash is the run id. ``node:`` is one machine's own
business and never leaves it. Every key is live: an unknown one is an error that names its path.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import msgspec
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from psyche.errors import ConfigError
from psyche.numerics.codecs.names import CODECS, usual_error_feedback, usual_result_codec
from psyche.numerics.digest import digest
from psyche.rates import bits_per_second

MANIFEST = "manifest.msgpack"
"""The run manifest in the directory of each of its processes."""

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Seconds = Positive
HexDigest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
PeerId = Annotated[str, StringConstraints(pattern=r"^12D3Koo[1-9A-HJ-NP-Za-km-z]{45}$")]


class Strict(BaseModel):
    """Unknown keys, implicit conversions and later changes are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# ---------------------------------------------------------------------------------------------- run


class Model(Strict):
    """A causal language model of ``transformers``: its architecture and that architecture's own settings."""

    architecture: str = "llama"
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _plain(self) -> Self:
        for name, value in self.settings.items():
            if not _is_plain(value):
                raise ValueError(f"settings.{name}: only numbers, text, true, false, null, and lists and maps of them")
        size = self.settings.get("vocab_size", 1)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"settings.vocab_size: {size!r} is not a whole number above 0")
        return self

    @property
    def vocab_size(self) -> int:
        """As the settings say; 0 where they do not."""
        return int(self.settings.get("vocab_size", 0))


def _is_plain(value: object, depth: int = 8) -> bool:
    """Whether a free-form value has one form in a manifest, and bounded depth: settings come from strangers, too."""
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


class StdlibSource(Strict):
    """The Python standard library's own source text: a real corpus that every machine has."""

    kind: Literal["stdlib"] = "stdlib"


class TextSource(Strict):
    """Plain text files; ``paths`` are files, directories or glob patterns. One file is one document."""

    kind: Literal["text"]
    paths: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]


class HubSource(Strict):
    """Anything ``datasets.load_dataset(path, name, data_files=…, split=…, streaming=True)`` reads."""

    kind: Literal["dataset"]
    path: str
    name: str | None = None
    split: str = "train"
    text_column: str = "text"
    data_files: str | None = None


class BpeTokenizer(Strict):
    """A byte-level BPE, trained on the corpus itself."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=260)] = 4096


class NamedTokenizer(Strict):
    """A tokenizer that ``transformers.AutoTokenizer.from_pretrained`` loads: a hub name or a directory."""

    kind: Literal["pretrained"]
    name: str


class Data(Strict):
    """What the run trains on. The token store that comes of it is fixed by hash in the manifest."""

    source: Annotated[StdlibSource | TextSource | HubSource, Field(discriminator="kind")] = StdlibSource()
    tokenizer: Annotated[BpeTokenizer | NamedTokenizer, Field(discriminator="kind")] = BpeTokenizer()
    sequence_length: Annotated[int, Field(ge=8)] = 256
    heldout_fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.02
    max_documents: Count | None = None


class CodecSpec(Strict):
    """How pseudo-gradients are encoded.

    ``error_feedback`` is β of DESIGN §5: 1 is plain error feedback, and left out it is what the codec is made for.
    """

    name: str = "int8"
    error_feedback: float = Field(default_factory=lambda data: usual_error_feedback(data["name"]), ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.name not in CODECS:
            raise ValueError(f"codec {self.name!r} is unknown; this version has {', '.join(CODECS)}")
        return self


class Inner(Strict):
    """AdamW on each node. Defaults are DiLoCo's (arXiv 2311.08105, table 5) with β₂ and clip of 2503.09799."""

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


class Deadlines(Strict):
    """Bounds in seconds. Within them a deadline is median + ``spread`` × MAD of what was observed."""

    round_min: Seconds = 20.0
    round_max: Seconds = 1800.0
    exchange_min: Seconds = 10.0
    exchange_max: Seconds = 600.0
    silence: Seconds = 15.0
    """A member not heard from for this long is counted as gone."""
    lease: Seconds = 15.0
    """A standby coordinator takes over when it has heard of no leader for this long."""
    spread: Positive = 5.0

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
    result_codec: str | None = None
    """Sharded: the codec of the aggregates; None is what ``codecs/names.py`` says goes with the payloads' codec."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.result_codec is not None and self.result_codec not in CODECS:
            raise ValueError(f"result_codec {self.result_codec!r} is unknown; this version has {', '.join(CODECS)}")
        return self


class Overlap(Strict):
    """Training that goes on while pseudo-gradients are on the wire (DESIGN §7).

    The model is exchanged in ``fragments`` (strided groups of layers), one each round, so that a parameter is
    synchronised every ``fragments × rounds.inner_steps`` steps, which is the H of Streaming DiLoCo (arXiv 2501.18512).
    A node takes up to ``late_steps`` of a round's inner steps before the outer step of the round before is known.
    Without either, training waits for the exchange.
    """

    fragments: Count = 1
    late_steps: Annotated[int, Field(ge=0)] = 0


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


class Resolved(Strict):
    """What a launch adds: facts that follow from the rest but that a joiner must be able to check."""

    coordinators: Annotated[tuple[PeerId, ...], Field(min_length=1, strict=False)]
    store: HexDigest
    """Root of the token store's index (the training split's shards, the held-out shards, the tokenizer)."""
    layout: HexDigest
    genesis: HexDigest
    """state_root before the first round."""
    parameters: Count
    flat_size: Count
    """Elements of the flat vector; with the codec it fixes the sizes of all payloads."""


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
    deadlines: Deadlines = Deadlines()
    standbys: Annotated[tuple[PeerId, ...], Field(strict=False, max_length=15)] = ()
    """PeerIDs of coordinators that take over, in this order, when the one that launches the run is gone."""
    heldout_sequences: Count = 64
    """Sequences of the held-out split on which the outer parameters are judged after each round."""

    @model_validator(mode="after")
    def _late(self) -> Self:
        if self.overlap.late_steps > self.rounds.inner_steps:
            raise ValueError(
                f"overlap.late_steps ({self.overlap.late_steps}) is above rounds.inner_steps "
                f"({self.rounds.inner_steps}): a round has no more steps to take early"
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
    def result_codec(self) -> str:
        """The codec of a sharded round's aggregates."""
        return self.exchange.result_codec or usual_result_codec(self.codec.name)

    @property
    def total_steps(self) -> int:
        """Inner steps of one member over the whole run."""
        return self.rounds.total * self.rounds.inner_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one inner step of one member."""
        return self.inner.batch_size * self.data.sequence_length


class Manifest(Strict):
    """The run manifest (DESIGN §2): the run, and what its launch resolved."""

    run: Run
    resolved: Resolved

    def encode(self) -> bytes:
        """Canonical msgpack: keys sorted, defaults written out. Equal manifests give equal bytes."""
        return msgspec.msgpack.encode(self.model_dump(mode="json"), order="sorted")

    @property
    def run_id(self) -> bytes:
        """32 bytes; the identity of the run everywhere."""
        return digest("manifest", self.encode())

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Inverse of :meth:`encode`. Raises :class:`ConfigError` on anything else."""
        try:
            tree = msgspec.msgpack.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"the run manifest is not valid msgpack: {error}") from None
        manifest = _validated(cls, tree, "the run manifest")
        if manifest.encode() != data:
            raise ConfigError("the run manifest is not in canonical form; its author runs another version of psyche")
        return manifest


# --------------------------------------------------------------------------------------------- node


class Wandb(Strict):
    """``auto`` is online where a key is configured and offline elsewhere; volunteers need no account."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "psyche"
    entity: str | None = None
    own_run: bool = False
    """Also log this node's own run, in the training run's group."""


def _rate(text: str) -> str:
    bits_per_second(text)
    return text


Rate = Annotated[str, AfterValidator(_rate)]


class Node(Strict):
    """One machine's own settings."""

    listen: tuple[str, ...] = Field(default=("/ip4/0.0.0.0/tcp/0",), min_length=1, strict=False)
    announce: tuple[str, ...] = Field(default=(), strict=False)
    """Addresses others can reach this node at, where those differ from ``listen`` (port forwarding)."""
    relay: Literal["auto", "off"] = "auto"
    """``auto``: where others find that they cannot dial this node, they reach it through other members; and it relays
    for others if it can be dialled and has no ``max_upload``."""
    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    outer_state: Literal["cpu", "gpu"] = "cpu"
    """Where θ, m and the error feedback lie. On the GPU that trains they take 12 bytes a parameter of its memory; then
    they need not be moved to be encoded and stepped."""
    threads: Count | None = None
    """CPU threads for training; all cores when absent."""
    micro_batch: Count | None = None
    """Sequences in one forward pass; the rest of a batch is accumulated. The whole batch when absent."""
    max_upload: Rate | None = None
    """What other nodes may fetch from this one, together, such as ``20mbit``; the whole line when absent."""
    max_download: Rate | None = None
    """What this node fetches from others; the same."""
    cache: Path = Field(default=Path("~/.cache/psyche"), strict=False)
    checkpoint_every: Count = 5
    """Rounds between checkpoints."""
    checkpoints_kept: Annotated[int, Field(ge=1)] = 3
    wandb: Wandb = Wandb()


class Config(Strict):
    """One configuration file."""

    run: Run
    node: Node = Node()


T = TypeVar("T", bound=BaseModel)


def load_config(path: Path) -> Config:
    """Read and check a configuration file. Raises :class:`ConfigError` naming field and reason."""
    return _validated(Config, _read_yaml(path), str(path))


def load_node(path: Path | None) -> Node:
    """The ``node:`` part of a file (other parts are ignored by a joiner), or the defaults."""
    if path is None:
        return Node()
    tree = _read_yaml(path)
    return _validated(Node, tree.get("node") or {}, f"{path}: node")


def override_node(
    node: Node,
    *,
    device: str | None = None,
    threads: int | None = None,
    port: int | None = None,
    max_upload: str | None = None,
    max_download: str | None = None,
) -> Node:
    """``node`` with what was said on the command line in place of what its file says."""
    changes: dict[str, Any] = {}
    if device is not None:
        changes["device"] = device
    if threads is not None:
        changes["threads"] = threads
    if max_upload is not None:
        changes["max_upload"] = max_upload
    if max_download is not None:
        changes["max_download"] = max_download
    if port is not None:
        changes["listen"] = [address.rpartition("/tcp/")[0] + f"/tcp/{port}" for address in node.listen]
    return _validated(Node, node.model_dump() | changes, "command line")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML follows 1.1, where ``4e-4`` is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping with the keys run: and node:")
    return tree


def _validated(kind: type[T], tree: Any, where: str) -> T:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """Every failure as ``field.path: reason``, joined by ``; ``."""
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"]) or "file"
        reason = "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        lines.append(f"{path}: {reason}")
    return "; ".join(lines)
