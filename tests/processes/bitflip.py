"""Run ``psyche join`` as a node in which one value of θ changes during the outer step of round 2."""

from __future__ import annotations

import sys

from psyche.cli import main
from psyche.diloco.replica import Replica
from psyche.numerics.aggregate import Gradient
from psyche.numerics.outer import OuterState

honest = Replica.outer_step


def outer_step(self: Replica, round_number: int, gradient: Gradient, outer: OuterState | None = None) -> None:
    if round_number == 2:
        self.outer.theta[12345] += 1e-3
    honest(self, round_number, gradient, outer)


Replica.outer_step = outer_step  # type: ignore[method-assign]
sys.argv[0:1] = ["psyche", "join"]
main()
