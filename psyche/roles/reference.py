"""The whole run in one process, with no network: the definition that a distributed run must match bit for bit.

It is also what ``psyche bench convergence`` runs: the same replicas and the same state machine, handed their
messages directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from psyche.config import Manifest
from psyche.protocol.messages import Record
from psyche.protocol.rounds import tick
from psyche.protocol.state import (
    Arrived,
    Attested,
    Certified,
    Committed,
    Effect,
    Event,
    Held,
    Opened,
    Planned,
    Proposed,
    State,
    Voted,
)
from psyche.roles.replica import Replica, Work
from psyche.roles.rules import rules_of


class Machine:
    """The coordinator's state machine at a standstill of time: nobody is late here."""

    def __init__(self, manifest: Manifest) -> None:
        self._rules = rules_of(manifest)
        self._state = State.initial(self._rules)

    def send(self, event: Event) -> list[Effect]:
        self._state, effects = tick(self._rules, self._state, event, now=0.0)
        return effects


def play(
    manifest: Manifest, replicas: Mapping[str, Replica], late: Callable[[int, str], int] = lambda round, node: 0
) -> Iterator[tuple[Record, dict[str, Work]]]:
    """Run to the end; after each round's outer step yield its record and what each member produced.

    ``replicas`` go by node id, as many as ``rounds.start_members`` or more, all at the genesis state. ``late`` says
    how many late steps a node takes while a round is on the wire, which in a distributed run time decides.
    """
    machine = Machine(manifest)
    effects: list[Effect] = []
    for node in sorted(replicas):
        effects += machine.send(Arrived(node, replicas[node].chain.state_root, "reference"))
    while plans := [effect.plan for effect in effects if isinstance(effect, Planned)]:
        plan = plans[-1]
        works = {node: replicas[node].train(plan) for node in sorted(replicas)}
        for node, work in works.items():
            machine.send(
                Committed(node, plan.round, work.contribution.commitment(node, manifest.run_id, plan.round), b"")
            )
        for node, work in works.items():
            machine.send(Opened(node, plan.round, work.contribution, b""))
        for node in works:
            effects = machine.send(Held(node, plan.round, frozenset(works)))
        (proposed,) = (effect for effect in effects if isinstance(effect, Proposed))
        record = proposed.record
        certified = [
            effect
            for node in works
            for effect in machine.send(Voted(node, plan.round, proposed.term, record.hash, b""))
            if isinstance(effect, Certified)
        ]
        assert len(certified) == 1
        payloads = {node: work.payload for node, work in works.items()}
        for node, replica in replicas.items():
            for _ in range(late(plan.round, node)):
                replica.step_late(plan)
            replica.apply(record, replica.gradient_of(record, payloads))
        yield record, works
        effects = [
            effect
            for node in works
            for effect in machine.send(Attested(node, plan.round, replicas[node].chain.state_root))
        ]
