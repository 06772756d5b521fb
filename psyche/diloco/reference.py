"""The whole run in one process, with no network: the definition that a distributed run must match bit for bit.

It is also what ``psyche bench convergence`` runs: the same replicas and the same state machine, handed their
messages directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from types import MappingProxyType

from psyche.config import Manifest
from psyche.diloco.local_update import Work
from psyche.diloco.outlier_detector import OutlierDetector
from psyche.diloco.replica import Replica
from psyche.exchange.merge import Merge
from psyche.exchange.rules import rules_of
from psyche.numerics.aggregate import reduce_slice
from psyche.numerics.digest import payload_root
from psyche.protocol.messages import Contribution, Plan, Record
from psyche.protocol.reduction import ReducerAssignment, assignment_of
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
    Promised,
    Proposed,
    Reported,
    Round,
    Said,
    State,
    Voted,
)


class Machine:
    """The coordinator's state machine at a standstill of time: nobody is late here."""

    def __init__(self, manifest: Manifest, due: Mapping[str, int]) -> None:
        self.rules = rules_of(manifest)
        self._state = replace(State.initial(self.rules), done=due)  # where no time passes, quotas stay as they are

    @property
    def round(self) -> Round:
        """The round in progress."""
        assert self._state.round is not None
        return self._state.round

    @property
    def assignment(self) -> ReducerAssignment:
        """Who reduces what of it."""
        assert self.round.reduction is not None
        return assignment_of(self.rules, self.round.plan, self.round.reduction)

    def promise(self, node: str) -> Promised:
        """``node`` follows the one leader there is."""
        return Promised(node, self._state.leading, self._state.rounds)

    def send(self, event: Event) -> list[Effect]:
        self._state, effects = tick(self.rules, self._state, event, now=0.0)
        return effects


def play(
    manifest: Manifest,
    replicas: Mapping[str, Replica],
    late: Callable[[int, str], int] = lambda round_number, node: 0,
    due: Mapping[str, int] = MappingProxyType({}),
    hear: Callable[[Record], Iterable[Said]] | None = None,
) -> Iterator[tuple[Record, dict[str, Work]]]:
    """Run to the end; after each round's outer step yield its record and what each member produced.

    ``replicas`` go by node id, as many as ``rounds.start_members`` or more, all at the genesis state. ``late`` says
    how many late steps a node takes while a round is on the wire, and ``due`` which quota a node has, if not H: in a
    distributed run time decides both. ``hear`` gives what auditors say after a record (``audit/simulated_audits.py``);
    without it nobody does the audits that are drawn.
    """
    machine = Machine(manifest, due)
    outlier_detector = OutlierDetector(replicas[min(replicas)].codec, manifest.run_id, manifest.run.overlap.fragments)
    effects: list[Effect] = []
    for node in sorted(replicas):
        effects += machine.send(Arrived(node, replicas[node].chain.state_root, "reference", 0))
    for node in sorted(replicas):
        effects += machine.send(machine.promise(node))
    while plans := [effect.plan for effect in effects if isinstance(effect, Planned)]:
        plan = plans[-1]
        works = {member.node: replicas[member.node].train(plan) for member in plan.members}
        record = _certified(machine, plan, replicas, works)
        payloads = {node: work.payload for node, work in works.items()}
        for node, replica in replicas.items():
            for _ in range(late(plan.round, node)):
                replica.overlapped_step(plan)
            replica.apply(record, replica.gradient_of(record, payloads))
        yield record, works
        counts = [part.stop - part.start for part in replicas[min(replicas)].slices_of(plan.round)]
        suspects = frozenset(outlier_detector.look(record, counts, payloads, range(len(counts))) if hear else ())
        effects = [
            effect
            for node in sorted(set(replicas) - set(record.audit_state.banned))
            for effect in machine.send(Attested(node, plan.round, replicas[node].chain.state_root, suspects))
        ]
        for said in hear(record) if hear else ():  # while the next round is trained for
            machine.send(said)


def _certified(machine: Machine, plan: Plan, replicas: Mapping[str, Replica], works: Mapping[str, Work]) -> Record:
    """The record of a round in which everybody is in time, holds everything and votes."""
    run_id = machine.rules.run_id
    for node, work in works.items():
        digest = work.contribution.commitment(node, run_id, plan.round)
        machine.send(Committed(node, plan.round, plan.term, digest, b""))
    for node, work in works.items():
        machine.send(Opened(node, plan.round, work.contribution, b""))
    effects: list[Effect] = []
    for node in works:
        effects = machine.send(Held(node, plan.round, frozenset(works)))
    for node, results in _reduced(machine, plan, replicas, works).items():
        reduction = machine.round.reduction
        assert reduction is not None
        effects += machine.send(Reported(node, plan.round, reduction.term, results))
    (proposed,) = (effect for effect in effects if isinstance(effect, Proposed))
    record = proposed.record
    certified = [
        effect
        for node in record.electorate
        for effect in machine.send(Voted(node, plan.round, proposed.term, record.hash, b""))
        if isinstance(effect, Certified)
    ]
    assert len(certified) == 1
    return record


def replay_ledger(replicas: Mapping[str, Replica], records: Sequence[Record]) -> Iterator[str]:
    """Do again what ``records`` say was done, from the first round on; the state root after each, in hex.

    What time decided is in them: quotas, steps that were given back, late steps. All the rest must follow. Raises
    ``ValueError`` where a contribution is not what its node's replica makes, where one was left out, whose steps
    nobody knows, or where the replicas differ.
    """
    for record, following in zip_longest(records, records[1:]):
        plan, payloads = record.plan, {}
        if record.excluded:
            raise ValueError(f"round {plan.round} left out {record.excluded[0].node}")
        for one in record.accepted:
            work = _done_again(replicas[one.node], plan, one.contribution)
            if work.contribution != one.contribution:
                raise ValueError(f"round {plan.round}: {one.node} contributed something else")
            payloads[one.node] = work.payload
        late = {one.node: one.contribution.overlap_steps for one in (following.accepted if following else ())}
        for node, replica in replicas.items():
            for _ in range(late.get(node, 0)):
                replica.overlapped_step(plan)
            replica.apply(record, replica.gradient_of(record, payloads))
        roots = {replica.chain.state_root.hex() for replica in replicas.values()}
        if len(roots) > 1:
            raise ValueError(f"the replicas differ after round {plan.round}")
        yield roots.pop()


def _done_again(replica: Replica, plan: Plan, done: Contribution) -> Work:
    """The round's work, with as many inner steps."""
    taken: list[int] = []
    return replica.train(
        plan,
        progress=lambda step, loss, lr: taken.append(step),
        enough=lambda: len(taken) >= done.inner_steps - done.overlap_steps,
    )


def _reduced(
    machine: Machine, plan: Plan, replicas: Mapping[str, Replica], works: Mapping[str, Work]
) -> dict[str, dict[int, bytes]]:
    """What each member finds for the groups it reduces, by group; nobody anything where everybody aggregates."""
    if not plan.is_sharded:
        return {}
    replica, assignment = replicas[min(replicas)], machine.assignment
    given = {node: work.contribution for node, work in works.items()}
    payloads = {node: work.payload for node, work in works.items()}
    merged = Merge.of(replica.run).gradient(replica.codec, plan, given, payloads)
    counts = [part.stop - part.start for part in replica.slices_of(plan.round)]
    result_codec = replica.backend.codec(replica.run.result_codec)

    def chunk(number: int) -> bytes:
        return reduce_slice(merged, result_codec, number, counts[number])

    roots = [
        payload_root([chunk(number) for number in assignment.slices_of(group)]) for group in range(assignment.groups)
    ]
    return {node: {group: roots[group] for group in assignment.duties(node)} for node in works}
