"""A node whose memory flips one bit of θ during the outer step of its second round; otherwise ``psyche join``."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from psyche.cli import main
from psyche.protocol.messages import Record
from psyche.roles.replica import Payload, Replica

honest = Replica.apply


def apply(self: Replica, record: Record, payloads: Mapping[str, Payload]) -> None:
    if record.plan.round == 2:
        self.outer.theta[12345] += 1e-3
    honest(self, record, payloads)


Replica.apply = apply  # type: ignore[method-assign]
sys.argv[0:1] = ["psyche", "join"]
main()
