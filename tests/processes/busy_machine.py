"""Run ``psyche join`` with a paced engine on a machine that counts as busy while a file exists."""

from __future__ import annotations

import os
import sys
from datetime import datetime
from pathlib import Path

from psyche.bench.harness.paced_engine import PacedEngine
from psyche.processes import availability
from psyche.training import engine_choice

IN_USE = "PSYCHE_TEST_IN_USE"
"""Environment variable with the path of that file."""


class BusyWhileFileExists(availability.Availability):
    def _check(self, moment: datetime) -> None:
        self.reason = "this machine is in use" if Path(os.environ[IN_USE]).exists() else ""


def main() -> None:
    from psyche.cli import main

    availability.Availability = BusyWhileFileExists  # type: ignore[misc]
    availability.CHECK_SECONDS = 0.2
    engine_choice.TorchEngine = PacedEngine  # type: ignore[attr-defined]
    sys.argv[0:1] = ["psyche", "join", "--idle-only"]
    main()


if __name__ == "__main__":
    main()
