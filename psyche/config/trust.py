"""How far nodes are trusted: how contributions are added up, and how often they are done again (DESIGN §8)."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from psyche.config.base import Count, Positive, Strict

MAX_POINTS = 4096
"""Trace points of a round, at most: what a kit's message has room for."""
Share = Annotated[float, Field(gt=0.0, le=1.0)]


class Aggregation(Strict):
    """From many pseudo-gradients to one, where some of them lie."""

    kind: Literal["mean", "norm_clip"] = "norm_clip"
    """``norm_clip`` clips each payload slice to the median norm: see ``numerics/aggregate.py``."""
    max_share: Share = 0.25
    """Of an outer step's weight, the most that one node has; or twice an equal share, where few contribute."""


class Audits(Strict):
    """How contributions are checked by doing them again."""

    rate: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    """Probability that a contribution is audited, for a node of no particular risk. 0: none ever is."""
    trace_steps: Count | None = None
    """Inner steps between the points of a round that a node commits to; None: its start and its end. Each segment is
    replayed on its own, which finds smaller frauds, and takes 12 bytes a parameter of disk a point."""
    window: Count = 20
    """Rounds within which a contribution can be challenged, and its credit is pending."""
    pass_error: Positive = 0.02
    """Relative error of a replay up to which it passes, and"""
    fail_error: Positive = 0.04
    """from which on it fails. ``psyche audit calibrate`` measures what honest nodes differ by."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.pass_error >= self.fail_error:
            raise ValueError(f"pass_error ({self.pass_error}) is not below fail_error ({self.fail_error})")
        if self.rate and self.window < (needed := ceil((1 - self.rate) / self.rate)):
            raise ValueError(
                f"window ({self.window}) is below (1 − rate) / rate: with fewer than {needed} rounds of pay pending, "
                "who cheats gains more than it loses when it is found out; raise either"
            )
        return self
