"""``psyche join`` with an accelerator that is busy for a fixed time in each inner step, whatever the processor does.

Nodes of a bench share the machine's few cores, so that one node's exchange would slow the others' steps and steps the
exchange, as on no real swarm. Here a step of a model far too small for it lasts PACE seconds: the rest is slept, as
a CPU sleeps while its GPU works.
"""

from __future__ import annotations

import os
import sys
import time

from psyche.training import choice
from psyche.training.engine import Batch
from psyche.training.torch_engine import TorchEngine

PACE = "PSYCHE_BENCH_PACE"
"""Environment: seconds that each inner step takes at least."""


class PacedEngine(TorchEngine):
    """Takes its time."""

    def step(self, batch: Batch, lr: float) -> float:
        began = time.monotonic()
        loss = super().step(batch, lr)
        time.sleep(max(0.0, began + float(os.environ[PACE]) - time.monotonic()))
        return loss


def main() -> None:
    from psyche.cli import main

    choice.TorchEngine = PacedEngine  # type: ignore[attr-defined]  # it imports the name
    sys.argv[0:1] = ["psyche", "join"]
    main()


if __name__ == "__main__":
    main()
