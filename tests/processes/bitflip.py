"""A node whose memory flips one bit of θ during the outer step of its second round; otherwise ``psyche join``."""

from __future__ import annotations

import sys

from psyche.cli import main
from psyche.diloco.replica import Replica
from psyche.numerics.aggregate import Gradient
from psyche.protocol.messages import Record

honest = Replica.step_outer


def step_outer(self: Replica, record: Record, gradient: Gradient) -> None:
    if record.plan.round == 2:
        self.outer.theta[12345] += 1e-3
    honest(self, record, gradient)


Replica.step_outer = step_outer  # type: ignore[method-assign]
sys.argv[0:1] = ["psyche", "join"]
main()
