"""The whole run in one process, without a network: the definition that a distributed run must match bit for bit.

The replicas and the coordinator's state machine are those of a distributed run; only the messages are handed over
directly. ``psyche bench convergence`` runs it, and ``replay_ledger`` checks a finished run's records with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from types import MappingProxyType

from psyche.config import Manifest
from psyche.diloco.outlier_detector import OutlierDetector
from psyche.diloco.replica import LocalUpdate, Replica
from psyche.exchange.aggregation import Aggregation
from psyche.exchange.rules import rules_of
from psyche.numerics.aggregate import reduce_slice
from psyche.numerics.digest import payload_root
from psyche.protocol.assignment import ReducerAssignment, assignment_of
from psyche.protocol.messages import Contribution, Plan, Record
from psyche.protocol.round_state import (
    Arrived,
    Attested,
    Certified,
    Committed,
    Effect,
    Event,
    Fetched,
    Planned,
    Promised,
    Proposed,
    Reported,
    Revealed,
    Round,
    State,
    StatementReceived,
    Voted,
)
from psyche.protocol.rounds import tick


class SimulatedCoordinator:
    """The coordinator's state machine with the clock stopped: no node is ever late."""

    def __init__(self, manifest: Manifest, quotas: Mapping[str, int]) -> None:
        self.rules = rules_of(manifest)
        self._state = replace(State.initial(self.rules), last_steps=quotas)  # without a clock, quotas never change

    @property
    def round(self) -> Round:
        """The round in progress."""
        assert self._state.round is not None
        return self._state.round

    @property
    def assignment(self) -> ReducerAssignment:
        """Which node reduces which slices of the round in progress."""
        assert self.round.reduction is not None
        return assignment_of(self.rules, self.round.plan, self.round.reduction)

    def promise(self, node: str) -> Promised:
        """Return ``node``'s promise to follow the only leader there is."""
        return Promised(node, self._state.lead_term, self._state.rounds)

    def send(self, event: Event) -> list[Effect]:
        """Advance the state machine by one event; return its effects."""
        self._state, effects = tick(self.rules, self._state, event, now=0.0)
        return effects


def simulate_rounds(
    manifest: Manifest,
    replicas: Mapping[str, Replica],
    overlap_steps: Callable[[int, str], int] = lambda round_number, node: 0,
    quotas: Mapping[str, int] = MappingProxyType({}),
    audit: Callable[[Record], Iterable[StatementReceived]] | None = None,
) -> Iterator[tuple[Record, dict[str, LocalUpdate]]]:
    """Run to the end. After each round's outer step, yield its record and the update of each member.

    ``replicas`` are by node id, at least ``rounds.start_members`` of them, all at the genesis state. In a distributed
    run, time decides two things that are arguments here: ``overlap_steps(round, node)`` is the number of inner steps a
    node takes while a round is exchanged, and ``quotas`` holds the inner steps of nodes whose quota is not H. ``audit``
    returns the auditors' messages about a record (``audit/simulated_audits.py``); without it no audit is answered.
    """
    coordinator = SimulatedCoordinator(manifest, quotas)
    outlier_detector = OutlierDetector(replicas[min(replicas)].codec, manifest.run_id, manifest.run.overlap.fragments)
    effects: list[Effect] = []
    for node in sorted(replicas):
        effects += coordinator.send(Arrived(node, replicas[node].chain.state_root, "reference", 0))
    for node in sorted(replicas):
        effects += coordinator.send(coordinator.promise(node))
    while plans := [effect.plan for effect in effects if isinstance(effect, Planned)]:
        plan = plans[-1]
        updates = {member.node: replicas[member.node].train(plan) for member in plan.members}
        record = _certify(coordinator, plan, replicas, updates)
        payloads = {node: update.payload for node, update in updates.items()}
        for node, replica in replicas.items():
            for _ in range(overlap_steps(plan.round, node)):
                replica.overlapped_step(plan)
            replica.apply(record, replica.gradient_of(record, payloads))
        yield record, updates
        counts = [part.stop - part.start for part in replicas[min(replicas)].slices_of(plan.round)]
        suspects = frozenset(outlier_detector.look(record, counts, payloads, range(len(counts))) if audit else ())
        effects = [
            effect
            for node in sorted(set(replicas) - set(record.audit_state.banned))
            for effect in coordinator.send(Attested(node, plan.round, replicas[node].chain.state_root, suspects))
        ]
        for said in audit(record) if audit else ():  # auditors answer while the next round trains
            coordinator.send(said)


def _certify(
    coordinator: SimulatedCoordinator,
    plan: Plan,
    replicas: Mapping[str, Replica],
    updates: Mapping[str, LocalUpdate],
) -> Record:
    """Return the record of a round in which every node is in time, has all payloads and votes."""
    run_id = coordinator.rules.run_id
    for node, update in updates.items():
        digest = update.contribution.commitment(node, run_id, plan.round)
        coordinator.send(Committed(node, plan.round, plan.term, digest, b""))
    for node, update in updates.items():
        coordinator.send(Revealed(node, plan.round, update.contribution, b""))
    effects: list[Effect] = []
    for node in updates:
        effects = coordinator.send(Fetched(node, plan.round, frozenset(updates)))
    for node, results in _reduce(coordinator, plan, replicas, updates).items():
        reduction = coordinator.round.reduction
        assert reduction is not None
        effects += coordinator.send(Reported(node, plan.round, reduction.term, results))
    (proposed,) = (effect for effect in effects if isinstance(effect, Proposed))
    record = proposed.record
    certified = [
        effect
        for node in record.electorate
        for effect in coordinator.send(Voted(node, plan.round, proposed.term, record.hash, b""))
        if isinstance(effect, Certified)
    ]
    assert len(certified) == 1
    return record


def replay_ledger(replicas: Mapping[str, Replica], records: Sequence[Record]) -> Iterator[str]:
    """Repeat what a run's ``records`` say, from the first round on. Yields the state root after each round, in hex.

    The records hold what time decided: quotas, early stops, overlap steps. Everything else must follow. Raises
    ``ValueError`` if a contribution is not the one that its node's replica makes, if the replicas differ, or if a round
    excluded a node, whose steps no record holds.
    """
    for record, following in zip_longest(records, records[1:]):
        plan, payloads = record.plan, {}
        if record.excluded:
            raise ValueError(f"round {plan.round} excluded {record.excluded[0].node}")
        for one in record.accepted:
            update = _retrain(replicas[one.node], plan, one.contribution)
            if update.contribution != one.contribution:
                raise ValueError(f"round {plan.round}: the contribution of {one.node} differs from its replica's")
            payloads[one.node] = update.payload
        taken = {one.node: one.contribution.overlap_steps for one in (following.accepted if following else ())}
        for node, replica in replicas.items():
            for _ in range(taken.get(node, 0)):
                replica.overlapped_step(plan)
            replica.apply(record, replica.gradient_of(record, payloads))
        roots = {replica.chain.state_root.hex() for replica in replicas.values()}
        if len(roots) > 1:
            raise ValueError(f"the replicas differ after round {plan.round}")
        yield roots.pop()


def _retrain(replica: Replica, plan: Plan, contribution: Contribution) -> LocalUpdate:
    """Train the round again with as many inner steps as ``contribution`` has."""
    taken: list[int] = []
    return replica.train(
        plan,
        on_step=lambda step, loss, lr: taken.append(step),
        stop_early=lambda: len(taken) >= contribution.inner_steps - contribution.overlap_steps,
    )


def _reduce(
    coordinator: SimulatedCoordinator,
    plan: Plan,
    replicas: Mapping[str, Replica],
    updates: Mapping[str, LocalUpdate],
) -> dict[str, dict[int, bytes]]:
    """Return, for each node of a sharded round, the payload roots of the slice groups that it reduces."""
    if not plan.is_sharded:
        return {}
    replica, assignment = replicas[min(replicas)], coordinator.assignment
    given = {node: update.contribution for node, update in updates.items()}
    payloads = {node: update.payload for node, update in updates.items()}
    merged = Aggregation.of(replica.run).gradient(replica.codec, plan, given, payloads)
    counts = [part.stop - part.start for part in replica.slices_of(plan.round)]
    result_codec = replica.backend.codec(replica.run.result_codec)

    def chunk(number: int) -> bytes:
        return reduce_slice(merged, result_codec, number, counts[number])

    roots = [
        payload_root([chunk(number) for number in assignment.slices_of(group)]) for group in range(assignment.groups)
    ]
    return {node: {group: roots[group] for group in assignment.duties(node)} for node in updates}
