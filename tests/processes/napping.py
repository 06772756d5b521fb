"""``psyche join`` on a paced accelerator, on a machine that is in use as long as a file of the test's is there."""

from __future__ import annotations

import os
import sys
from datetime import datetime
from pathlib import Path

from psyche.bench.utilisation.paced import PacedEngine
from psyche.processes import attendance
from psyche.training import choice

IN_USE = "PSYCHE_TEST_IN_USE"
"""Environment: that file."""


class Napping(attendance.Calendar):
    def _look(self, moment: datetime) -> None:
        self.closed = "this machine is in use" if Path(os.environ[IN_USE]).exists() else ""


def main() -> None:
    from psyche.cli import main

    attendance.Calendar = Napping  # type: ignore[misc]
    attendance.LOOK_SECONDS = 0.2
    choice.TorchEngine = PacedEngine  # type: ignore[attr-defined]
    sys.argv[0:1] = ["psyche", "join", "--idle-only"]
    main()


if __name__ == "__main__":
    main()
