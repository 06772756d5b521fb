"""Run ``psyche join`` as a malicious node; the first argument names the attack."""

from __future__ import annotations

import sys
from collections.abc import Callable

import psyche.audit.auditor as auditing
import psyche.processes.node_process as processes
from psyche.cli import main
from psyche.network.transport import Refused
from psyche.protocol.audit_messages import Finding
from tests.slow.adversary.malicious_nodes import Cheat, Swarm, noise, other_data, scaled, zero


def fail_every_audit() -> None:
    """Fail every audited node without replaying."""
    auditing.audit = lambda *arguments, **known: Finding("measured", 900_000, 0, 0)


def withhold_bundles() -> None:
    """Refuse every request for an audit bundle."""

    async def serve(self: auditing.Auditor) -> None:
        async def refuse(peer: str, request: bytes) -> bytes:
            raise Refused("no")

        await self._network.rpc.serve("audit-bundle", refuse, max_request=8)

    auditing.Auditor.serve = serve  # type: ignore[method-assign]


def cheat_in_training(**fields: object) -> Callable[[], None]:
    """Return a function that makes this node a :class:`Cheat` with these fields."""

    def attack() -> None:
        for name, value in fields.items():
            setattr(Cheat, name, value)
        Cheat.swarm = Swarm()
        processes.Replica = Cheat  # type: ignore[misc]

    return attack


ATTACKS: dict[str, Callable[[], None]] = {
    "honest": lambda: None,
    "zero": cheat_in_training(forge=staticmethod(zero)),
    "noise": cheat_in_training(forge=staticmethod(noise)),
    "flip": cheat_in_training(forge=staticmethod(scaled(-1))),
    "tenfold": cheat_in_training(forge=staticmethod(scaled(10))),
    "half": cheat_in_training(lazy=0.5),
    "data": cheat_in_training(data=staticmethod(other_data)),
    "liar": fail_every_audit,
    "silent": withhold_bundles,
}

if __name__ == "__main__":
    ATTACKS[sys.argv[1]]()
    sys.argv[0:2] = ["psyche", "join"]
    main()
