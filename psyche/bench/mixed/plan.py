"""A run of nodes whose inner steps take different times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psyche.bench.utilisation.plan import small_config
from psyche.config import Config, Rounds

SKIPPED = 3
"""Rounds at the start that are not counted: in the first nobody knows how fast the others are, and the slow give back
most of it; two more measure."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    speeds: Sequence[float]
    """Of each node, relative to each other."""
    step_seconds: float = 0.2
    """Of an inner step on the fastest."""
    inner_steps: int = 40
    """H."""
    rounds: int = 6
    """Counted ones."""

    @property
    def steps_take(self) -> list[float]:
        """Seconds of an inner step on each node."""
        return [self.step_seconds * max(self.speeds) / speed for speed in self.speeds]

    @property
    def counted(self) -> range:
        """Numbers of the rounds that count."""
        return range(SKIPPED + 1, SKIPPED + self.rounds + 1)

    @property
    def config(self) -> Config:
        """The run."""
        config, members = small_config(), len(self.speeds)
        rounds = Rounds(total=SKIPPED + self.rounds, inner_steps=self.inner_steps, start_members=members)
        run = config.run.model_copy(update={"name": "mixed", "rounds": rounds})
        return config.model_copy(update={"run": run})
