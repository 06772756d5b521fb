"""Several coordinators and their members without a network: the test decides who talks to whom and who is down.

A member's acceptor and chain and a coordinator's signed state survive a crash; all else is lost. Signatures are not
computed: a coordinator signs whatever its signed state allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from psyche.protocol.acceptor import Acceptor, Chain, Refusal, consider, promise
from psyche.protocol.assignment import next_position
from psyche.protocol.certificates import (
    ConflictingSignature,
    SignedState,
    lead,
    seal,
    seals_needed,
    sign_reconfiguration,
    signatures_needed,
)
from psyche.protocol.messages import Contribution, Plan, Proposal, Record
from psyche.protocol.round_state import (
    Abandoned,
    Arrived,
    Attested,
    Certified,
    Committed,
    CosignersUnreachable,
    Event,
    Fetched,
    Planned,
    Promised,
    Proposed,
    Restored,
    Revealed,
    Rules,
    Seen,
    SignatureConflict,
    Stage,
    State,
    Tick,
    Voted,
)
from psyche.protocol.rounds import tick
from tests.protocol.one_leader import GENESIS, RUN_ID, contribution, root_after


@dataclass
class Voter:
    """A member. :meth:`crash` keeps what is on disk: acceptor, accepted proposal, evidence and chain."""

    node: str
    acceptor: Acceptor = field(default_factory=Acceptor)
    accepted: Proposal | None = None
    evidence: tuple[dict[str, tuple[bytes, bytes]], dict[str, tuple[Contribution, bytes]]] = ({}, {})
    chain: Chain = field(default_factory=lambda: Chain(0, RUN_ID, GENESIS, 0))
    last: Record | None = None
    """The last record, certified and applied."""
    plan: Plan | None = None
    commitments: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    reveals: dict[str, tuple[Contribution, bytes]] = field(default_factory=dict)
    up: bool = True

    def crash(self) -> None:
        self.plan, self.commitments, self.reveals, self.up = None, {}, {}, False


class Coordinator:
    """A coordinator."""

    def __init__(self, cluster: Cluster, index: int) -> None:
        self.cluster, self.index = cluster, index
        self.signed_state = SignedState()
        self.crash()

    def crash(self) -> None:
        self.up = self.leads = False
        self.state = State.initial(self.cluster.rules)
        self.later = 0
        self.proposal: Proposal | None = None
        """The proposal that members see."""
        self.unsigned: tuple[int, Record] | None = None
        self.unsealed: Record | None = None
        self.certificate: Record | None = None
        self.conflict: SignatureConflict | None = None
        self.unreachable: CosignersUnreachable | None = None

    def begin(self) -> None:
        self.up = self.leads = True
        self.signed_state = lead(
            self.signed_state, self.index, self.cluster.rules.coordinators, max(self.later, self.state.term)
        )
        self.state = State.initial(self.cluster.rules, self.signed_state.term)
        self.proposal = self.unsigned = self.unsealed = self.certificate = None

    def send(self, event: Event) -> None:
        self.state, effects = tick(self.cluster.rules, self.state, event, self.cluster.now)
        for effect in effects:
            match effect:
                case Planned() | Abandoned():
                    self.proposal = self.unsigned = None
                case Proposed(term, record):
                    self.proposal, self.unsigned, self.unsealed = None, (term, record), None
                case Certified(record, _):
                    self.unsigned, self.unsealed = None, record
        self.sign()

    def sign(self) -> None:
        """Collect missing signatures and seals from the reachable coordinators."""
        if self.unsigned is not None:
            term, record = self.unsigned
            if not record.reconfiguration or self.cluster.reconfiguration(self, record):
                self.proposal, self.unsigned = Proposal(term, record, ()), None
        if self.unsealed is not None and self.cluster.sealed(self, self.unsealed):
            self.certificate, self.unsealed = self.unsealed, None


class Cluster:
    """All members and coordinators and a clock; checks that no round is certified twice."""

    def __init__(self, rules: Rules, nodes: Sequence[str]) -> None:
        self.rules, self.now = rules, 1000.0
        self.voters = [Voter(node) for node in nodes]
        self.coordinators = [Coordinator(self, index) for index in range(rules.coordinators)]
        self.certified: dict[int, Record] = {}
        self.reconfigurations: set[tuple[bytes, int, tuple[str, ...]]] = set()
        self.cut: set[frozenset[int]] = set()
        """Pairs of coordinators that cannot reach each other."""
        for coordinator in self.coordinators:
            coordinator.up = True
        self.coordinators[0].begin()

    # ------------------------------------------------------------------------------ coordinators

    def reached(self, coordinator: Coordinator) -> list[Coordinator]:
        return [coordinator] + [
            one
            for one in self.coordinators
            if one is not coordinator and one.up and frozenset((one.index, coordinator.index)) not in self.cut
        ]

    def reconfiguration(self, coordinator: Coordinator, record: Record) -> bool:
        """Collect signatures for the record's reconfiguration; return whether it is in force."""
        key = (record.plan.previous, record.reconfiguration, record.electorate)
        if key in self.reconfigurations:
            return True
        number, previous = record.plan.round, record.plan.previous
        needed = signatures_needed(self.rules.coordinators)
        coordinator.unreachable = None
        if len(self.reached(coordinator)) < needed:  # so it does not sign itself
            coordinator.unreachable = CosignersUnreachable(record.hash)
            return False
        signed = self.gather(
            coordinator,
            record,
            lambda signed_state: sign_reconfiguration(
                signed_state, number, previous, record.reconfiguration, record.electorate
            ),
        )
        if signed >= needed:
            self.reconfigurations.add(key)
            coordinator.conflict = None
        return key in self.reconfigurations

    def sealed(self, coordinator: Coordinator, record: Record) -> bool:
        number, previous = record.plan.round, record.plan.previous
        given = self.gather(
            coordinator,
            record,
            lambda signed_state: seal(signed_state, number, previous, record.reconfiguration, record.hash),
        )
        if given < seals_needed(self.rules.coordinators):
            return False
        coordinator.conflict = None
        known = self.certified.setdefault(number, record)
        assert known.hash == record.hash, f"round {number} was certified twice"
        return True

    def gather(self, coordinator: Coordinator, record: Record, sign: Callable[[SignedState], SignedState]) -> int:
        """Return how many coordinators sign. Conflicts are reported to ``coordinator`` with the next tick."""
        signed = 0
        for one in self.reached(coordinator):
            try:
                one.signed_state = sign(one.signed_state)
                signed += 1
            except ConflictingSignature as reason:
                known = coordinator.conflict.reconfiguration if coordinator.conflict else 0
                if coordinator.conflict is None or reason.reconfiguration > known:
                    coordinator.conflict = SignatureConflict(
                        record.hash, reason.reconfiguration, b"" if reason.reconfiguration else reason.sealed
                    )
        return signed

    # ----------------------------------------------------------------------------------- members

    def talk(self, voter: Voter, coordinator: Coordinator) -> None:
        """Let a member take one turn with this coordinator's run status."""
        if not (voter.up and coordinator.up and coordinator.leads):
            return
        state = coordinator.state
        try:
            acceptor = promise(voter.acceptor, state.lead_term)
        except Refusal:
            coordinator.later = max(coordinator.later, voter.acceptor.promised, voter.acceptor.term)
            return
        if voter.node not in state.peers:
            if voter.last is not None:
                coordinator.send(Restored(voter.last))
                if coordinator.state.head == voter.last.hash and coordinator.certificate is None:
                    coordinator.certificate = voter.last
            coordinator.send(Arrived(voter.node, voter.chain.state_root, "cpu", voter.chain.rounds))
        coordinator.send(Seen(voter.node))
        if voter.node not in coordinator.state.promises:
            voter.acceptor = acceptor
            coordinator.send(self.promised(voter, coordinator.state.lead_term))
        if coordinator.certificate is not None and coordinator.certificate.plan.round > voter.chain.rounds:
            self.apply(voter, coordinator, coordinator.certificate)
        elif (known := coordinator.state.round) is None or known.plan.previous == voter.chain.head:
            self.take_part(voter, coordinator)

    def promised(self, voter: Voter, term: int) -> Promised:
        accepted = voter.accepted
        recent = accepted is not None and accepted.record.plan.round == voter.chain.rounds + 1
        evidence = voter.evidence if recent else (voter.commitments, voter.reveals)
        plan = voter.plan if voter.plan and voter.plan.round == voter.chain.rounds + 1 else None
        return Promised(
            node=voter.node,
            term=term,
            rounds=voter.chain.rounds,
            accepted=accepted.record if accepted else None,
            accepted_term=accepted.term if accepted else 0,
            plan=None if recent else plan,
            commitments=evidence[0] if recent or plan else {},
            contributions=evidence[1] if recent or plan else {},
        )

    def apply(self, voter: Voter, coordinator: Coordinator, record: Record) -> None:
        """Apply the record, or fetch the resulting state."""
        position = next_position(record.plan, self.rules.batch_size, self.rules.overlap_steps)
        root = root_after(record)
        voter.chain = Chain(record.plan.round, record.hash, root, position, record.standing)
        voter.last, voter.plan, voter.commitments, voter.reveals = record, None, {}, {}
        current = coordinator.state.round
        if current is not None and current.certified and current.plan.round == record.plan.round:
            coordinator.send(Attested(voter.node, record.plan.round, root))
        else:
            coordinator.send(Arrived(voter.node, root, "cpu", voter.chain.rounds))

    def take_part(self, voter: Voter, coordinator: Coordinator) -> None:
        current = coordinator.state.round
        if current is None:
            if coordinator.state.peers[voter.node].state_root != voter.chain.state_root:
                coordinator.send(Arrived(voter.node, voter.chain.state_root, "cpu", voter.chain.rounds))
            return
        plan, node = current.plan, voter.node
        member = plan.member(node) is not None
        if not member and node not in voter.chain.weights:
            return
        if voter.plan != plan:
            voter.plan, voter.commitments, voter.reveals = plan, {}, {}
        given = contribution(node, plan, self.rules)
        commitment = given.commitment(node, RUN_ID, plan.round)
        if current.stage is Stage.COMMITTING:
            if member and node not in current.commitments:
                coordinator.send(Committed(node, plan.round, plan.term, commitment, b""))
            return
        if not voter.commitments:
            voter.commitments = dict(current.commitments)
        voter.reveals |= {one: reveal for one, reveal in current.contributions.items() if one in voter.commitments}
        if node in current.commitments and node not in current.contributions:
            coordinator.send(Revealed(node, plan.round, given, b""))
        elif member and (current.proposal is None or not current.holdings.get(node)):
            coordinator.send(Fetched(node, plan.round, frozenset(current.contributions)))
        if (
            coordinator.proposal is not None
            and coordinator.state.round is not None
            and not coordinator.state.round.certified
        ):
            self.vote(voter, coordinator, coordinator.proposal)

    def vote(self, voter: Voter, coordinator: Coordinator, proposal: Proposal) -> None:
        try:
            acceptor = consider(
                voter.acceptor,
                proposal,
                rules=self.rules,
                chain=voter.chain,
                committed={node: commitment for node, (commitment, _) in voter.commitments.items()},
                opened={node: given for node, (given, _) in voter.reveals.items()},
                held=frozenset(voter.reveals),
            )
        except Refusal:
            return
        voter.acceptor, voter.accepted = acceptor, proposal
        voter.evidence = dict(voter.commitments), dict(voter.reveals)
        coordinator.send(Voted(voter.node, proposal.record.plan.round, proposal.term, proposal.record.hash, b""))

    # ------------------------------------------------------------------------------------- faults

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for coordinator in self.coordinators:
            if coordinator.up and coordinator.leads:
                if coordinator.conflict is not None:
                    event, coordinator.conflict = coordinator.conflict, None
                    coordinator.send(event)
                if coordinator.unreachable is not None:
                    unsigned, coordinator.unreachable = coordinator.unreachable, None
                    coordinator.send(unsigned)
                coordinator.send(Tick())

    def run_undisturbed(self, coordinator: Coordinator, turns: int) -> None:
        """Bring all nodes up, and let all members talk to ``coordinator``."""
        self.cut.clear()
        for one in self.coordinators:
            one.up = True
        for voter in self.voters:
            voter.up = True
        for _ in range(turns):
            for voter in self.voters:
                self.talk(voter, coordinator)
            if coordinator.later > coordinator.state.term:
                coordinator.begin()
            self.wait(1.0)


def with_coordinators(rules: Rules, count: int, probation: int = 0) -> Rules:
    return replace(rules, coordinators=count, rounds=10**6, min_members=1, probation=probation)
