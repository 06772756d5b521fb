"""``psyche join`` of a node that lies; the first argument says how."""

from __future__ import annotations

import sys
from collections.abc import Callable

import psyche.audit.auditor as auditing
import psyche.processes.node_process as processes
from psyche.cli import main
from psyche.network.transport import Refused
from psyche.protocol.audit_messages import Finding
from tests.slow.adversary.cheats import Cheat, Swarm, noise, other_data, scaled, zero


def lies_about_others() -> None:
    """Fails whatever it audits."""
    auditing.audit = lambda *arguments, **known: Finding("measured", 900_000, 0, 0)


def hands_nothing_over() -> None:
    """Says to auditors that it has nothing."""

    async def serve(self: auditing.Auditor) -> None:
        async def refuse(peer: str, request: bytes) -> bytes:
            raise Refused("no")

        await self._network.rpc.serve("audit-bundle", refuse, max_request=8)

    auditing.Auditor.serve = serve  # type: ignore[method-assign]


def trains_wrongly(**how: object) -> Callable[[], None]:
    def arm() -> None:
        for name, value in how.items():
            setattr(Cheat, name, value)
        Cheat.swarm = Swarm()
        processes.Replica = Cheat  # type: ignore[misc]

    return arm


WAYS: dict[str, Callable[[], None]] = {
    "honest": lambda: None,
    "zero": trains_wrongly(forge=staticmethod(zero)),
    "noise": trains_wrongly(forge=staticmethod(noise)),
    "flip": trains_wrongly(forge=staticmethod(scaled(-1))),
    "tenfold": trains_wrongly(forge=staticmethod(scaled(10))),
    "half": trains_wrongly(lazy=0.5),
    "data": trains_wrongly(data=staticmethod(other_data)),
    "liar": lies_about_others,
    "silent": hands_nothing_over,
}

if __name__ == "__main__":
    WAYS[sys.argv[1]]()
    sys.argv[0:2] = ["psyche", "join"]
    main()
