"""How far nodes are trusted: how contributions are aggregated, and how often they are audited."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from psyche.config.base import Count, Positive, Strict

MAX_POINTS = 4096
"""Most trace points of a round: what the message of an audit bundle has room for."""
Share = Annotated[float, Field(gt=0.0, le=1.0)]


class Aggregation(Strict):
    """From many pseudo-gradients to one, where some of them lie."""

    kind: Literal["mean", "norm_clip"] = "norm_clip"
    """``norm_clip`` clips each payload slice to the median norm: see ``numerics/aggregate.py``."""
    max_share: Share = 0.25
    """Of an outer step's weight, the most that one node has; or twice an equal share, where few contribute."""


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
