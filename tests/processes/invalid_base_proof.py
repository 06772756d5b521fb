"""Run ``psyche join`` as a node whose proof of the base state is invalid."""

from __future__ import annotations

import sys

from psyche.cli import main
from psyche.diloco.replica import Replica
from psyche.processes import node_process as processes
from psyche.protocol.messages import Plan


class InvalidBaseProof(Replica):
    def base_proof(self, plan: Plan, node: str) -> bytes:
        proof = super().base_proof(plan, node)
        return bytes(len(proof)) if node == self.node else proof


if __name__ == "__main__":
    processes.Replica = InvalidBaseProof  # type: ignore[misc]
    sys.argv[0:1] = ["psyche", "join"]
    main()
