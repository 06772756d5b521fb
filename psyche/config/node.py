"""One machine's own settings: they never leave it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from psyche.config.base import Count, Positive, Strict, validated
from psyche.errors import ConfigError
from psyche.rates import bits_per_second


class Wandb(Strict):
    """``auto`` is online where a key is configured and offline elsewhere; volunteers need no account."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "psyche"
    entity: str | None = None
    own_run: bool = False
    """Also log this node's own run, in the training run's group."""


class PrivateData(Strict):
    """Text that this machine trains on instead of the run's, and that stays here; and what may be learned of it.

    Whatever the others see of all rounds of the run together is (``epsilon``, ``delta``)-differentially private
    (``training/privacy.py`` says what that protects).
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
    private: PrivateData | None = None

    @model_validator(mode="after")
    def _silent(self) -> Self:
        if self.private is not None and self.wandb.own_run:
            raise ValueError("wandb.own_run sends losses on private data to W&B: leave out one of the two")
        return self


def override_node(
    node: Node,
    *,
    device: str | None = None,
    threads: int | None = None,
    port: int | None = None,
    max_upload: str | None = None,
    max_download: str | None = None,
    private: Mapping[str, Any] | None = None,
) -> Node:
    """``node`` with what was said on the command line in place of what its file says; None says nothing."""
    changes: dict[str, Any] = {}
    if device is not None:
        changes["device"] = device
    if threads is not None:
        changes["threads"] = threads
    if max_upload is not None:
        changes["max_upload"] = max_upload
    if max_download is not None:
        changes["max_download"] = max_download
    if told := {name: value for name, value in (private or {}).items() if value is not None}:
        changes["private"] = ({} if node.private is None else node.private.model_dump()) | told
        if not {"path", "epsilon"} <= changes["private"].keys():
            raise ConfigError(
                "--private-data DIR and --epsilon go together: say whose text, and how much may be learned of it"
            )
    if port is not None:
        changes["listen"] = [address.rpartition("/tcp/")[0] + f"/tcp/{port}" for address in node.listen]
    return validated(Node, node.model_dump() | changes, "command line")
