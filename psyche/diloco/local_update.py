"""What a round of training leaves: a contribution and its payload, or steps that are not one yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from psyche.diloco.trace import Trace
from psyche.errors import PsycheError
from psyche.protocol.messages import Contribution

Slices = Sequence[bytes]
"""The encoded slices of one contribution, in the order of ``FlatLayout.fragments()``."""


class Interrupted(Exception):
    """Training was stopped before the round's last inner step; nothing of it was encoded."""


class NonFiniteParameter(PsycheError):
    """A parameter became NaN or infinite. The message names the tensor."""


@dataclass(frozen=True)
class Work:
    """What one round of local training produced."""

    round: int
    contribution: Contribution
    payload: Slices
    loss: float
    """Mean over the inner steps, nats a token."""
    lr: float
    """Of the last inner step."""
    norm: float
    """‖D(payload)‖₂, the same value on every node that decodes it."""


@dataclass
class Steps:
    """Inner steps of one round so far."""

    trace: Trace = field(default_factory=Trace)
    losses: list[float] = field(default_factory=list)
    lr: float = 0.0
    """Of the last one."""
    late: int = 0
    """Those among them that were taken while the round before was on the wire."""
    based: bool = False
    """Whether that round's outer step has reached x. No late step follows it: a replay has to know where it came."""
