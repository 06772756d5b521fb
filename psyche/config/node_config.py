"""The ``node:`` section: settings of one machine, which never leave it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator

from psyche.config.base import Count, Positive, Strict, validated
from psyche.config.ethereum_address import address_bytes
from psyche.config.units import Hours, bits_per_second, byte_count
from psyche.errors import ConfigError


class Wandb(Strict):
    """Logging to Weights & Biases. Contributors need no account: the coordinator logs the whole run."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """``auto``: online if a W&B key is configured, else offline. Default: works with and without an account."""
    project: str = "psyche"
    """W&B project."""
    entity: str | None = None
    """W&B team or user. Default: the account's."""
    own_run: bool = False
    """Also log this node as a W&B run of its own, in the training run's group. Default: the coordinator's is enough."""


class DeepSpeed(Strict):
    """How several GPUs of one node share a model: ZeRO (arXiv 1910.02054)."""

    stage: Literal[1, 2, 3] | None = None
    """1 partitions the optimizer state, 2 also the gradients, 3 also the parameters. Default: the lowest that fits."""
    offload: Literal["none", "cpu"] = "none"
    """``cpu``: keep the optimizer, its state and the fp32 weights in main memory. Default: faster without."""
    ranks: Count | None = None
    """Number of ranks on a CPU (for tests); on GPUs there is one per GPU. Default: 1."""


class PrivateData(Strict):
    """Private text to train on instead of the run's data (federated mode). It never leaves this machine.

    Everything that other nodes see in all rounds together is (``epsilon``, ``delta``)-differentially private
    (``federated/gaussian_mechanism.py`` says what that protects).
    """

    path: Annotated[Path, Field(strict=False)]
    """Directory of UTF-8 files, each one document, and ``.jsonl`` files with one document per line in the field
    ``text``."""
    epsilon: Positive
    """Privacy budget ε. The node leaves the run once it is spent."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-6
    """Probability δ that the ε bound does not hold. Default: below one over the number of documents of most corpora."""
    noise_multiplier: Positive | None = None
    """Noise standard deviation divided by the sensitivity; less noise spends the budget in fewer rounds. Default: the
    least that makes the budget last for the whole run."""


def _rate(text: str) -> str:
    bits_per_second(text)
    return text


def _size(text: str) -> str:
    byte_count(text)
    return text


def _quoted(given: object) -> object:
    if type(given) is int:
        raise ValueError("put the address in quotes: YAML reads 0x… as a number")
    return given


def _address(text: str) -> str:
    address_bytes(text)
    return text


def _hours(text: str) -> str:
    Hours.parse(text)
    return text


Gpus = Annotated[
    str,
    BeforeValidator(lambda given: str(given) if type(given) is int else given),  # YAML reads a lone digit as a number
    StringConstraints(pattern=r"^(auto|all|[1-9]\d{0,2}|\d{1,3}(,\d{1,3})+)$"),
]
Rate = Annotated[str, AfterValidator(_rate)]
Size = Annotated[str, AfterValidator(_size)]
Address = Annotated[str, BeforeValidator(_quoted), AfterValidator(_address)]
Schedule = Annotated[str, AfterValidator(_hours)]


class Node(Strict):
    """Settings of one machine."""

    listen: tuple[str, ...] = Field(default=("/ip4/0.0.0.0/tcp/0",), min_length=1, strict=False)
    """Multiaddrs to listen on; port 0 is any free port, kept between starts. Default: all interfaces."""
    announce: tuple[str, ...] = Field(default=(), strict=False)
    """Multiaddrs at which others reach this node, if they differ from ``listen`` (port forwarding). Default: those
    addresses."""
    relay: Literal["auto", "off"] = "auto"
    """``auto``: use relays if this node cannot be dialled, and be a relay if it can be dialled and has no
    ``max_upload``. Default: nodes behind NAT can take part."""
    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """Device to train on: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. Default: a GPU if there is one."""
    gpus: Gpus = "auto"
    """GPUs to train on: ``all``, a number of GPUs, or their indices, such as ``0,2``. Default: all if DeepSpeed is
    installed, else the first."""
    deepspeed: DeepSpeed | None = None
    """Use of DeepSpeed. Default: used with the settings below if several GPUs train."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products. Default: bf16 on GPUs that support it, else fp32."""
    outer_state: Literal["cpu", "gpu"] = "cpu"
    """Where θ, the outer momentum and the error feedback are kept. On the GPU they take 12 bytes of its memory per
    parameter and need no copies for encoding and the outer step. Default: GPU memory is scarce."""
    threads: Count | None = None
    """CPU threads for training. Default: all cores."""
    micro_batch: Count | None = None
    """Sequences per forward pass; gradients of a batch are accumulated. Default: as many as fit into memory."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them. Default: only if one sequence does not fit
    otherwise."""
    compile: Literal["auto", "on", "off"] = "auto"
    """``torch.compile``: ``auto`` uses it if training takes four hours or more and a trial before joining shows a gain.
    Default: compiling takes minutes."""
    max_upload: Rate | None = None
    """Upload limit, such as ``20mbit``. Default: none."""
    max_download: Rate | None = None
    """Download limit, such as ``100mbit``. Default: none."""
    cache: Path = Field(default=Path("~/.cache/psyche"), strict=False)
    """Directory of prepared token stores and fetched shards. Default: ``~/.cache/psyche``."""
    max_gpu_memory: Size | None = None
    """Limit of GPU memory, such as ``6gb``; ignored on a CPU. Default: none."""
    schedule: Schedule | None = None
    """Hours in which this node trains, in local time, such as ``22:00-07:00``; several separated by commas. Default:
    always."""
    idle_only: bool = False
    """Train only while no other program uses the CPUs or the GPU. Default: always."""
    data_cache: Size = "20GB"
    """Limit of fetched shards in ``cache``, of all runs together; the least recently used are deleted. Stores
    prepared on this machine do not count. Default: chosen for a desktop's disk."""
    data_mirrors: tuple[str, ...] = Field(default=(), strict=False)
    """Directories or fsspec URLs that this node tries first for shards, with this machine's credentials. Default:
    none."""
    checkpoint_every: Count = 5
    """Rounds between checkpoints. Default: for rounds of minutes; use 1 for rounds of hours."""
    checkpoints_kept: Annotated[int, Field(ge=1)] = 3
    """Checkpoints to keep. Default: a damaged one can be replaced by an older one."""
    wandb: Wandb = Wandb()
    """Logging to Weights & Biases."""
    private: PrivateData | None = None
    """Private text to train on. Default: the run's data."""
    payout: Address | None = None
    """Ethereum address that this node's credits are paid to; the one sent with the last accepted contribution counts.
    Default: none, so nobody can claim the credits, which are still counted."""

    @model_validator(mode="after")
    def _silent(self) -> Self:
        if self.private is not None and self.wandb.own_run:
            raise ValueError("wandb.own_run would send losses on private data to W&B: remove one of the two")
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
    """Return ``node`` with the options of the command line in place of the file's settings; None leaves a setting."""
    options: dict[str, Any] = {
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
    changes = {field: value for field, value in options.items() if value is not None}
    if given := {name: value for name, value in (private or {}).items() if value is not None}:
        changes["private"] = ({} if node.private is None else node.private.model_dump()) | given
        if not {"path", "epsilon"} <= changes["private"].keys():
            raise ConfigError(
                "--private-data DIR needs --epsilon, the privacy budget, and --epsilon needs --private-data"
            )
    if port is not None:
        changes["listen"] = [address.rpartition("/tcp/")[0] + f"/tcp/{port}" for address in node.listen]
    return validated(Node, node.model_dump() | changes, "command line")
