"""Several coordinators and their members, without a network: who talks to whom, and who is down, the test decides.

Members have a disk: an acceptor and a chain. Coordinators have one: an oath. All the rest is lost in a crash.
Signatures are not made: that somebody signed is that its oath allowed it.
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
    """A member. What is above the line in ``crash`` is on its disk."""

    node: str
    acceptor: Acceptor = field(default_factory=Acceptor)
    accepted: Proposal | None = None
    evidence: tuple[dict[str, tuple[bytes, bytes]], dict[str, tuple[Contribution, bytes]]] = ({}, {})
    chain: Chain = field(default_factory=lambda: Chain(0, RUN_ID, GENESIS, 0))
    last: Record | None = None
    """Certified, and applied."""
    plan: Plan | None = None
    shown: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    opened: dict[str, tuple[Contribution, bytes]] = field(default_factory=dict)
    up: bool = True

    def crash(self) -> None:
        self.plan, self.shown, self.opened, self.up = None, {}, {}, False


class Seat:
    """A coordinator."""

    def __init__(self, parliament: Parliament, place: int) -> None:
        self.parliament, self.place = parliament, place
        self.signed_state = SignedState()
        self.crash()

    def crash(self) -> None:
        self.up = self.leads = False
        self.state = State.initial(self.parliament.rules)
        self.later = 0
        self.proposal: Proposal | None = None
        """Shown to members."""
        self.unsigned: tuple[int, Record] | None = None
        self.unsealed: Record | None = None
        self.certificate: Record | None = None
        self.overruled: SignatureConflict | None = None
        self.unsigned_by_enough: CosignersUnreachable | None = None

    def begin(self) -> None:
        self.up = self.leads = True
        self.signed_state = lead(
            self.signed_state, self.place, self.parliament.rules.coordinators, max(self.later, self.state.term)
        )
        self.state = State.initial(self.parliament.rules, self.signed_state.term)
        self.proposal = self.unsigned = self.unsealed = self.certificate = None

    def send(self, event: Event) -> None:
        self.state, effects = tick(self.parliament.rules, self.state, event, self.parliament.now)
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
        """Ask the others that can be reached for what is missing."""
        if self.unsigned is not None:
            term, record = self.unsigned
            if not record.reconfiguration or self.parliament.reconfiguration(self, record):
                self.proposal, self.unsigned = Proposal(term, record, ()), None
        if self.unsealed is not None and self.parliament.sealed(self, self.unsealed):
            self.certificate, self.unsealed = self.unsealed, None


class Parliament:
    """Everybody, a clock, and an inspector of the one promise: no round is certified twice."""

    def __init__(self, rules: Rules, nodes: Sequence[str]) -> None:
        self.rules, self.now = rules, 1000.0
        self.voters = [Voter(node) for node in nodes]
        self.seats = [Seat(self, place) for place in range(rules.coordinators)]
        self.certified: dict[int, Record] = {}
        self.rosters: set[tuple[bytes, int, tuple[str, ...]]] = set()
        self.cut: set[frozenset[int]] = set()
        """Pairs of coordinators that cannot reach each other."""
        for seat in self.seats:
            seat.up = True
        self.seats[0].begin()

    # ------------------------------------------------------------------------------ coordinators

    def reached(self, seat: Seat) -> list[Seat]:
        return [seat] + [
            one
            for one in self.seats
            if one is not seat and one.up and frozenset((one.place, seat.place)) not in self.cut
        ]

    def reconfiguration(self, seat: Seat, record: Record) -> bool:
        """Whether the roster that ``record`` is under is in force, now that ``seat`` has asked for signatures."""
        key = (record.plan.previous, record.reconfiguration, record.electorate)
        if key in self.rosters:
            return True
        number, previous = record.plan.round, record.plan.previous
        needed = signatures_needed(self.rules.coordinators)
        seat.unsigned_by_enough = None
        if len(self.reached(seat)) < needed:  # so it does not sign itself, either
            seat.unsigned_by_enough = CosignersUnreachable(record.hash)
            return False
        signed = self.gather(
            seat,
            record,
            lambda signed_state: sign_reconfiguration(
                signed_state, number, previous, record.reconfiguration, record.electorate
            ),
        )
        if signed >= needed:
            self.rosters.add(key)
            seat.overruled = None
        return key in self.rosters

    def sealed(self, seat: Seat, record: Record) -> bool:
        number, previous = record.plan.round, record.plan.previous
        given = self.gather(
            seat, record, lambda signed_state: seal(signed_state, number, previous, record.reconfiguration, record.hash)
        )
        if given < seals_needed(self.rules.coordinators):
            return False
        seat.overruled = None
        known = self.certified.setdefault(number, record)
        assert known.hash == record.hash, f"round {number} was certified twice"
        return True

    def gather(self, seat: Seat, record: Record, swear: Callable[[SignedState], SignedState]) -> int:
        """How many sign; why others do not is told to ``seat``'s machine with the next tick."""
        signed = 0
        for one in self.reached(seat):
            try:
                one.signed_state = swear(one.signed_state)
                signed += 1
            except ConflictingSignature as reason:
                known = seat.overruled.reconfiguration if seat.overruled else 0
                if seat.overruled is None or reason.reconfiguration > known:
                    seat.overruled = SignatureConflict(
                        record.hash, reason.reconfiguration, b"" if reason.reconfiguration else reason.sealed
                    )
        return signed

    # ----------------------------------------------------------------------------------- members

    def talk(self, voter: Voter, seat: Seat) -> None:
        """One turn of a member that has this coordinator's board in front of it."""
        if not (voter.up and seat.up and seat.leads):
            return
        state = seat.state
        try:
            acceptor = promise(voter.acceptor, state.lead_term)
        except Refusal:
            seat.later = max(seat.later, voter.acceptor.promised, voter.acceptor.term)
            return
        if voter.node not in state.peers:
            if voter.last is not None:
                seat.send(Restored(voter.last))
                if seat.state.head == voter.last.hash and seat.certificate is None:
                    seat.certificate = voter.last
            seat.send(Arrived(voter.node, voter.chain.state_root, "cpu", voter.chain.rounds))
        seat.send(Seen(voter.node))
        if voter.node not in seat.state.promises:
            voter.acceptor = acceptor
            seat.send(self.promised(voter, seat.state.lead_term))
        if seat.certificate is not None and seat.certificate.plan.round > voter.chain.rounds:
            self.apply(voter, seat, seat.certificate)
        elif (known := seat.state.round) is None or known.plan.previous == voter.chain.head:
            self.take_part(voter, seat)

    def promised(self, voter: Voter, term: int) -> Promised:
        accepted = voter.accepted
        recent = accepted is not None and accepted.record.plan.round == voter.chain.rounds + 1
        evidence = voter.evidence if recent else (voter.shown, voter.opened)
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

    def apply(self, voter: Voter, seat: Seat, record: Record) -> None:
        """Take the outer step, or the state of those who did."""
        position = next_position(record.plan, self.rules.batch_size, self.rules.overlap_steps)
        root = root_after(record)
        voter.chain = Chain(record.plan.round, record.hash, root, position, record.standing)
        voter.last, voter.plan, voter.shown, voter.opened = record, None, {}, {}
        current = seat.state.round
        if current is not None and current.certified and current.plan.round == record.plan.round:
            seat.send(Attested(voter.node, record.plan.round, root))
        else:
            seat.send(Arrived(voter.node, root, "cpu", voter.chain.rounds))

    def take_part(self, voter: Voter, seat: Seat) -> None:
        current = seat.state.round
        if current is None:
            if seat.state.peers[voter.node].state_root != voter.chain.state_root:
                seat.send(Arrived(voter.node, voter.chain.state_root, "cpu", voter.chain.rounds))
            return
        plan, node = current.plan, voter.node
        member = plan.member(node) is not None
        if not member and node not in voter.chain.weights:
            return
        if voter.plan != plan:
            voter.plan, voter.shown, voter.opened = plan, {}, {}
        given = contribution(node, plan, self.rules)
        commitment = given.commitment(node, RUN_ID, plan.round)
        if current.stage is Stage.COMMITTING:
            if member and node not in current.commitments:
                seat.send(Committed(node, plan.round, plan.term, commitment, b""))
            return
        if not voter.shown:
            voter.shown = dict(current.commitments)
        voter.opened |= {one: shown for one, shown in current.contributions.items() if one in voter.shown}
        if node in current.commitments and node not in current.contributions:
            seat.send(Revealed(node, plan.round, given, b""))
        elif member and (current.proposal is None or not current.holdings.get(node)):
            seat.send(Fetched(node, plan.round, frozenset(current.contributions)))
        if seat.proposal is not None and seat.state.round is not None and not seat.state.round.certified:
            self.vote(voter, seat, seat.proposal)

    def vote(self, voter: Voter, seat: Seat, proposal: Proposal) -> None:
        try:
            acceptor = consider(
                voter.acceptor,
                proposal,
                rules=self.rules,
                chain=voter.chain,
                committed={node: commitment for node, (commitment, _) in voter.shown.items()},
                opened={node: given for node, (given, _) in voter.opened.items()},
                held=frozenset(voter.opened),
            )
        except Refusal:
            return
        voter.acceptor, voter.accepted = acceptor, proposal
        voter.evidence = dict(voter.shown), dict(voter.opened)
        seat.send(Voted(voter.node, proposal.record.plan.round, proposal.term, proposal.record.hash, b""))

    # ---------------------------------------------------------------------------------- the world

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for seat in self.seats:
            if seat.up and seat.leads:
                if seat.overruled is not None:
                    event, seat.overruled = seat.overruled, None
                    seat.send(event)
                if seat.unsigned_by_enough is not None:
                    unsigned, seat.unsigned_by_enough = seat.unsigned_by_enough, None
                    seat.send(unsigned)
                seat.send(Tick())

    def calm(self, seat: Seat, turns: int) -> None:
        """Everybody is up and talks to ``seat``."""
        self.cut.clear()
        for one in self.seats:
            one.up = True
        for voter in self.voters:
            voter.up = True
        for _ in range(turns):
            for voter in self.voters:
                self.talk(voter, seat)
            if seat.later > seat.state.term:
                seat.begin()
            self.wait(1.0)


def with_coordinators(rules: Rules, count: int, probation: int = 0) -> Rules:
    return replace(rules, coordinators=count, rounds=10**6, min_members=1, probation=probation)
