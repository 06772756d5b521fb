"""One machine's own settings: they never leave it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator

from psyche.config.base import Count, Positive, Strict, validated
from psyche.config.ethereum_address import address_bytes
from psyche.errors import ConfigError
from psyche.hours import Hours
from psyche.rates import bits_per_second
from psyche.sizes import byte_count


class Wandb(Strict):
    """``auto`` is online where a key is configured and offline elsewhere; volunteers need no account."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "psyche"
    entity: str | None = None
    own_run: bool = False
    """Also log this node's own run, in the training run's group."""


class DeepSpeed(Strict):
    """How several ranks of one node share a model: ZeRO (arXiv 1910.02054)."""

    stage: Literal[1, 2, 3] | None = None
    """1 cuts up the optimizer's state, 2 gradients, too, 3 parameters, too; the lowest that fits when absent."""
    offload: Literal["none", "cpu"] = "none"
    """``cpu``: the optimizer, its state and the fp32 weights that it steps lie in the machine's memory."""
    ranks: Count | None = None
    """Processes where the CPU trains. GPUs have one each: ``gpus`` says which."""


class PrivateData(Strict):
    """Text that this machine trains on instead of the run's, and that stays here; and what may be learned of it.

    Whatever the others see of all rounds of the run together is (``epsilon``, ``delta``)-differentially private
    (``federated/gaussian_mechanism.py`` says what that protects).
    """

    path: Annotated[Path, Field(strict=False)]
    """A directory of UTF-8 files, each a document, and ``.jsonl`` files, each line one by its field ``text``."""
    epsilon: Positive
    """The privacy budget. Once it is spent this node leaves the run."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-6
    noise_multiplier: Positive | None = None
    """Standard deviation of the noise over the sensitivity. None: what makes the budget last for all of the run's
    rounds; less noise spends it in fewer."""


def _rate(text: str) -> str:
    bits_per_second(text)
    return text


def _size(text: str) -> str:
    byte_count(text)
    return text


def _quoted(given: object) -> object:
    if type(given) is int:
        raise ValueError("put the address in quotes: YAML takes what begins with 0x for a number")
    return given


def _address(text: str) -> str:
    address_bytes(text)
    return text


def _hours(text: str) -> str:
    Hours.parse(text)
    return text


Gpus = Annotated[
    str,
    BeforeValidator(lambda given: str(given) if type(given) is int else given),  # YAML has numbers
    StringConstraints(pattern=r"^(auto|all|[1-9]\d{0,2}|\d{1,3}(,\d{1,3})+)$"),
]
Rate = Annotated[str, AfterValidator(_rate)]
Size = Annotated[str, AfterValidator(_size)]
Address = Annotated[str, BeforeValidator(_quoted), AfterValidator(_address)]
Schedule = Annotated[str, AfterValidator(_hours)]


class Node(Strict):
    """One machine's own settings."""

    listen: tuple[str, ...] = Field(default=("/ip4/0.0.0.0/tcp/0",), min_length=1, strict=False)
    announce: tuple[str, ...] = Field(default=(), strict=False)
    """Addresses others can reach this node at, where those differ from ``listen`` (port forwarding)."""
    relay: Literal["auto", "off"] = "auto"
    """``auto``: where others find that they cannot dial this node, they reach it through other members; and it relays
    for others if it can be dialled and has no ``max_upload``."""
    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    gpus: Gpus = "auto"
    """Which of the machine's GPUs train: ``all``, a number of them, or their numbers, such as ``0,2``. ``auto`` is all
    where DeepSpeed is installed, and else the first."""
    deepspeed: DeepSpeed | None = None
    """Absent: DeepSpeed is used where several GPUs train, with its defaults."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    outer_state: Literal["cpu", "gpu"] = "cpu"
    """Where θ, m and the error feedback lie. On the GPU that trains they take 12 bytes a parameter of its memory; then
    they need not be moved to be encoded and stepped."""
    threads: Count | None = None
    """CPU threads for training; all cores when absent."""
    micro_batch: Count | None = None
    """Sequences in one forward pass; the rest of a batch is accumulated. As many as fit into memory when absent."""
    activation_checkpointing: bool = False
    """Compute activations twice instead of keeping them. Done by itself where one sequence does not fit otherwise."""
    compile: Literal["auto", "on", "off"] = "auto"
    """``torch.compile``: ``auto`` uses it where training takes four hours or more and a trial, before the node joins,
    shows that it pays; ``on`` uses it even where it does not pay."""
    max_upload: Rate | None = None
    """What other nodes may fetch from this one, together, such as ``20mbit``; the whole line when absent."""
    max_download: Rate | None = None
    """What this node fetches from others; the same."""
    cache: Path = Field(default=Path("~/.cache/psyche"), strict=False)
    max_gpu_memory: Size | None = None
    """What this process may take of its GPU's memory, such as ``6gb``; all of it when absent. No limit on a CPU."""
    schedule: Schedule | None = None
    """Hours in which this node takes part, in local time, such as ``22:00-07:00``; always when absent."""
    idle_only: bool = False
    """Take part only while other programs leave this machine's CPUs and GPU alone."""
    data_cache: Size = "20GB"
    """Room in ``cache`` for shards fetched from elsewhere, of all runs together; those used longest ago make way. A
    store that was prepared on this machine does not count."""
    data_mirrors: tuple[str, ...] = Field(default=(), strict=False)
    """Where this node looks for shards before anywhere else: directories, or fsspec URLs, with this machine's
    credentials."""
    checkpoint_every: Count = 5
    """Rounds between checkpoints."""
    checkpoints_kept: Annotated[int, Field(ge=1)] = 3
    wandb: Wandb = Wandb()
    private: PrivateData | None = None
    payout: Address | None = None
    """Address that this node's credits are to be paid to, as Ethereum writes it: the last one that came with an
    accepted contribution counts. Without one, credits are counted all the same, and are nobody's to claim."""

    @model_validator(mode="after")
    def _silent(self) -> Self:
        if self.private is not None and self.wandb.own_run:
            raise ValueError("wandb.own_run sends losses on private data to W&B: leave out one of the two")
        return self


def override_node(
    node: Node,
    *,
    device: str | None = None,
    gpus: str | None = None,
    threads: int | None = None,
    port: int | None = None,
    max_upload: str | None = None,
    max_download: str | None = None,
    max_gpu_memory: str | None = None,
    schedule: str | None = None,
    idle_only: bool | None = None,
    payout: str | None = None,
    private: Mapping[str, Any] | None = None,
) -> Node:
    """``node`` with what was said on the command line in place of what its file says; None says nothing."""
    said: dict[str, Any] = {
        "device": device,
        "gpus": gpus,
        "threads": threads,
        "max_upload": max_upload,
        "max_download": max_download,
        "max_gpu_memory": max_gpu_memory,
        "schedule": schedule,
        "idle_only": idle_only,
        "payout": payout,
    }
    changes = {field: value for field, value in said.items() if value is not None}
    if told := {name: value for name, value in (private or {}).items() if value is not None}:
        changes["private"] = ({} if node.private is None else node.private.model_dump()) | told
        if not {"path", "epsilon"} <= changes["private"].keys():
            raise ConfigError(
                "--private-data DIR and --epsilon go together: say whose text, and how much may be learned of it"
            )
    if port is not None:
        changes["listen"] = [address.rpartition("/tcp/")[0] + f"/tcp/{port}" for address in node.listen]
    return validated(Node, node.model_dump() | changes, "command line")
