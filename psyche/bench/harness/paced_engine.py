"""``psyche join`` with an emulated accelerator that is busy for a fixed time in each inner step.

The nodes of a bench share a few cores: without pacing, one node's exchange would slow another's steps, which does not
happen between machines. Here a step of a very small model is padded by sleep to ``PACE`` seconds, as a CPU sleeps
while its GPU works.
"""

from __future__ import annotations

import os
import runpy
import sys
import time

from psyche.training import engine_choice
from psyche.training.engine import Batch
from psyche.training.torch_engine import TorchEngine

PACE = "PSYCHE_BENCH_PACE"
"""Environment variable: minimum seconds of an inner step."""


class PacedEngine(TorchEngine):
    """An engine whose steps take at least ``PACE`` seconds."""

    def step(self, batch: Batch, lr: float) -> float:
        began = time.monotonic()
        loss = super().step(batch, lr)
        time.sleep(max(0.0, began + float(os.environ[PACE]) - time.monotonic()))
        return loss


def main() -> None:
    """Run ``psyche join`` with this process's arguments, training with :class:`PacedEngine`."""
    engine_choice.TorchEngine = PacedEngine  # type: ignore[attr-defined]  # it imports the name
    sys.argv = ["psyche", "join", *sys.argv[1:]]
    runpy.run_module("psyche", run_name="__main__")


if __name__ == "__main__":
    main()
