"""What the engine bench measures: one model on one batch, trained in several ways."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from psyche.config import Config, load_config

Way = Literal["loop", "trainer", "engine", "node"]
"""A plain PyTorch loop; ``transformers.Trainer``; the engine alone; a node in a run, with a coordinator beside it."""
WAYS: tuple[Way, ...] = ("loop", "trainer", "engine", "node")
WARM_UP = 5
"""Steps that are not counted: memory is allocated, caches fill."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure. Travels to the processes that measure as JSON."""

    config: str
    """File of a run to take model, data and batch from."""
    steps: int = 40
    """Counted ones, of each way in each repeat."""
    repeats: int = 5
    threads: int = 1
    device: str = "cpu"

    def load(self) -> Config:
        """The configuration, on the device and threads of this plan. Raises ``PsycheError``."""
        config = load_config(Path(self.config))
        changes = {"device": self.device, "threads": self.threads}
        return config.model_copy(update={"node": config.node.model_copy(update=changes)})


def order(repeat: int) -> tuple[Way, ...]:
    """The ways, another one first each time, so that what the machine does meanwhile is nobody's."""
    first = repeat % len(WAYS)
    return WAYS[first:] + WAYS[:first]
