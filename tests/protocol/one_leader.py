"""PeerIDs, honest contributions, and a coordinator's state machine that checks its own invariants."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import msgspec

from psyche.numerics.digest import digest
from psyche.protocol.assignment import reducer_order_fault
from psyche.protocol.audits import audits_fault
from psyche.protocol.messages import Contribution, Plan, Record
from psyche.protocol.round_state import (
    Arrived,
    Attested,
    AuditRules,
    Certified,
    Committed,
    Effect,
    Event,
    Fetched,
    Left,
    Phase,
    Planned,
    Promised,
    Proposed,
    Rejected,
    Revealed,
    Rules,
    Seen,
    Stage,
    State,
    StateAgreed,
    Tick,
    Voted,
)
from psyche.protocol.rounds import tick
from psyche.protocol.standing import FOUNDER_WEIGHT, has_quorum, standing_fault, weights_before

ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
RUN_ID = b"r" * 32
GENESIS = b"g" * 32
TOKENS_PER_STEP = 40
RULES = Rules(
    run_id=RUN_ID,
    genesis=GENESIS,
    rounds=3,
    inner_steps=5,
    overlap_steps=0,
    batch_size=4,
    tokens_per_step=TOKENS_PER_STEP,
    payload_bytes=1500,
    slices=(5,),
    reducers=2,
    sharded_from=None,
    start_members=4,
    min_members=2,
    round_bounds=(10.0, 100.0),
    exchange_bounds=(5.0, 50.0),
    silence=15.0,
    probation=0,
    private_share=0.25,
    audits=AuditRules(),
    coordinators=1,
)


def peer_id(number: int) -> str:
    """Return a well-formed PeerID. PeerIDs sort like their numbers."""
    tail = "".join(random.Random(number).choices(ALPHABET, k=42))
    return f"12D3Koo{ALPHABET[number // 58 % 58]}{ALPHABET[number // 58 // 58 % 58]}{ALPHABET[number % 58]}{tail}"


def nodes(count: int) -> list[str]:
    return sorted(peer_id(number) for number in range(count))


def contribution(node: str, plan: Plan, rules: Rules = RULES, **changes: object) -> Contribution:
    """Return the contribution of an honest ``node`` to ``plan``; ``changes`` replace fields."""
    member = plan.member(node)
    steps = member.inner_steps if member else rules.inner_steps
    tag = digest("work", node.encode(), plan.seed, plan.base_root)
    honest = Contribution(
        base_root=plan.base_root,
        data_digest=tag,
        base_proof=tag,
        trace_root=tag,
        residual_in=tag,
        residual_out=tag,
        payload_root=digest("payload", tag),
        payload_bytes=rules.payload_bytes,
        inner_steps=steps,
        overlap_steps=0,
        tokens=steps * rules.tokens_per_step,
        private=False,
        payout=b"",
        salt=tag,
    )
    values = {name: changes.get(name, getattr(honest, name)) for name in honest.__struct_fields__}
    return Contribution(**values)


def root_after(record: Record) -> bytes:
    """Return the state root that every honest node has after ``record``."""
    return digest("outer", record.hash, record.plan.base_root)


def with_electorate(record: Record, names: Sequence[str], **changes: object) -> Record:
    """Return ``record`` under another electorate, with the record's weights where it has any, else a founder's."""
    weights = tuple(record.weights.get(name, FOUNDER_WEIGHT) for name in names)
    return msgspec.structs.replace(record, electorate=tuple(names), voting_weights=weights, **changes)


class Leader:
    """A coordinator's state machine and a clock; every transition is checked against the invariants."""

    def __init__(self, rules: Rules = RULES, state: State | None = None, now: float = 1000.0) -> None:
        self.rules, self.now = rules, now
        self.state = state or State.initial(rules)
        self.effects: list[Effect] = []
        self.promising = True
        self.certified: dict[int, Record] = {}
        self.commitments_before_closing: dict[tuple[int, int], dict[str, bytes]] = {}

    # ------------------------------------------------------------------------------------- events

    def send(self, event: Event) -> list[Effect]:
        before = copy.deepcopy(self.state)
        state, effects = tick(self.rules, self.state, event, self.now)
        again, same_effects = tick(self.rules, self.state, event, self.now)
        assert self.state == before, "tick changed the state it was given"
        assert (again, same_effects) == (state, effects), "tick is not deterministic"
        self._inspect(self.state, event, state, effects)
        self.state = state
        self.effects += effects
        if isinstance(event, Arrived) and self.promising:  # a node that arrives promises to follow the leader
            effects = effects + self.send(Promised(event.node, state.lead_term, state.rounds))
        return effects

    def wait(self, seconds: float, alive: Iterable[str] | None = None, step: float = 1.0) -> list[Effect]:
        """Let time pass. ``alive`` nodes (default: all peers) send heartbeats meanwhile."""
        alive = list(self.state.peers) if alive is None else list(alive)
        effects: list[Effect] = []
        until = self.now + seconds
        while self.now < until:
            self.now = min(self.now + step, until)
            for node in alive:
                effects += self.send(Seen(node))
            effects += self.send(Tick())
        return effects

    def arrive(self, members: Sequence[str], state_root: bytes | None = None) -> list[Effect]:
        root = (self.state.state_root or GENESIS) if state_root is None else state_root
        return [effect for node in members for effect in self.send(Arrived(node, root, "cpu", self.state.rounds))]

    def commit(self, node: str, **changes: object) -> list[Effect]:
        plan = self.plan
        digest_ = contribution(node, plan, self.rules, **changes).commitment(node, RUN_ID, plan.round)
        return self.send(Committed(node, plan.round, plan.term, digest_, f"commitment {node}".encode()))

    def reveal(self, node: str, **changes: object) -> list[Effect]:
        plan = self.plan
        given = contribution(node, plan, self.rules, **changes)
        return self.send(Revealed(node, plan.round, given, f"reveal {node}".encode()))

    def hold(self, node: str, held: Iterable[str]) -> list[Effect]:
        return self.send(Fetched(node, self.plan.round, frozenset(held)))

    def vote(self, node: str) -> list[Effect]:
        current = self.state.round
        assert current is not None
        assert current.proposal is not None
        return self.send(Voted(node, current.plan.round, current.term, current.proposal.hash, f"vote {node}".encode()))

    def attest(self, node: str, root: bytes | None = None) -> list[Effect]:
        current = self.state.round
        assert current is not None
        assert current.proposal is not None
        return self.send(Attested(node, current.plan.round, root or root_after(current.proposal)))

    # ------------------------------------------------------------------------------ whole stages

    def commit_all(self, members: Sequence[str]) -> None:
        """Commit for all of ``members``."""
        for node in members:
            self.commit(node)

    def exchange(self, members: Sequence[str]) -> None:
        """Reveal for all of ``members``, and report that each holds everything."""
        for node in members:
            self.reveal(node)
        for node in members:
            self.hold(node, members)

    def certify(self, members: Sequence[str]) -> None:
        for node in members:
            if self.state.round is not None and not self.state.round.certified:
                self.vote(node)

    def attest_all(self, members: Sequence[str]) -> None:
        root = root_after(self.proposal)
        for node in members:
            if self.state.round is not None and self.state.round.plan == self.plan:
                self.attest(node, root)

    def run_round(self, members: Sequence[str]) -> Record:
        number = self.plan.round
        self.commit_all(members)
        self.exchange(members)
        self.certify(members)
        root = root_after(self.proposal)
        for node in members:
            self.send(Attested(node, number, root))
        return self.certified[number]

    @property
    def plan(self) -> Plan:
        assert self.state.round is not None
        return self.state.round.plan

    @property
    def proposal(self) -> Record:
        assert self.state.round is not None
        assert self.state.round.proposal is not None
        return self.state.round.proposal

    # ----------------------------------------------------------------------------- the invariants

    def _inspect(self, before: State, event: Event, after: State, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Planned(plan):
                    assert plan.round == after.rounds + 1, "a round was skipped"
                    assert [m.node for m in plan.members] == sorted({m.node for m in plan.members})
                    assert plan.weights.items() <= weights_before(after.standing, plan).items()
                    assert plan.weights
                    assert plan.previous == after.head
                    assert plan.base_root == after.state_root
                case Certified(record, votes):
                    self._inspect_certified(before, event, record, votes)
                case StateAgreed(round_number, _):
                    assert round_number in self.certified
                    assert after.rounds == round_number
                    assert after.head == self.certified[round_number].hash
                case Proposed(term, record):
                    assert term > before.term, "a term was used twice"
                    self._inspect_record(after if after.round else before, record)
                case Rejected(node, _, reason):
                    assert node == getattr(event, "node", None)
                    assert reason
                case _:
                    pass
        assert after.rounds >= before.rounds
        assert after.term >= before.term
        if after.round is not None and after.round.stage is not Stage.COMMITTING:
            key = (after.round.plan.round, after.round.plan.term)
            commitments = {node: value for node, (value, _) in after.round.commitments.items()}
            assert self.commitments_before_closing.setdefault(key, commitments) == commitments
        if after.round is not None:
            members = {member.node for member in after.round.plan.members}
            for mapping in (after.round.commitments, after.round.contributions):
                assert set(mapping) <= members, "a node outside the plan takes part"
            assert set(after.round.votes) <= members | set(after.electorate)
        assert (after.phase is Phase.FINISHED) == (after.rounds >= self.rules.rounds) or after.round is None

    def _inspect_record(self, state: State, record: Record) -> None:
        plan = record.plan
        members = [member.node for member in plan.members]
        accepted, excluded = [a.node for a in record.accepted], [e.node for e in record.excluded]
        assert accepted == sorted(set(accepted))
        assert sorted(accepted + excluded) == members, "a member is neither accepted nor excluded"
        assert all(e.reason for e in record.excluded)
        assert record.electorate == state.electorate
        able = {one.node for one in record.accepted if not one.contribution.private} - set(record.audit_state.banned)
        assert self.rules.probation or self.rules.audits.rate or able <= set(record.voters)
        assert standing_fault(record, state.standing, state.audit_state, self.rules) is None
        assert audits_fault(record, state.audit_state, state.standing, self.rules) is None
        committed = self.commitments_before_closing.get((plan.round, plan.term), {})
        assert state.round is not None
        for one in record.accepted:
            wanted = one.contribution.commitment(one.node, RUN_ID, plan.round)
            assert committed.get(one.node, state.round.commitments[one.node][0]) == wanted
            assert one.contribution.tokens == one.contribution.inner_steps * self.rules.tokens_per_step
        self._inspect_results(state, record)

    def _inspect_results(self, state: State, record: Record) -> None:
        """Check that the results of a sharded record are those of the majority of reports on each group."""
        current, plan = state.round, record.plan
        assert current is not None
        if not plan.is_sharded:
            assert (record.reducer_order, record.results, record.dissenters) == ((), (), ())
            return
        reduction = current.reduction
        assert reduction is not None
        assert plan.reducers == self.rules.reducers_for(len(plan.members))
        assert reducer_order_fault(record) is None
        assert {one.node for one in record.accepted} == reduction.selected
        assert len(record.results) == min(len(record.reducer_order), self.rules.slices_in(plan.round)) > 0
        dissenters_found = set()
        for group, root in enumerate(record.results):
            reports = reduction.reports[group]
            assert 2 * sum(found == root for found in reports.values()) > len(reports)
            dissenters_found |= {node for node, found in reports.items() if found != root}
        assert record.dissenters == tuple(sorted(dissenters_found))

    def _inspect_certified(self, before: State, event: Event, record: Record, votes: tuple[bytes, ...]) -> None:
        number = record.plan.round
        assert number not in self.certified, f"round {number} was certified twice"
        self.certified[number] = record
        assert before.round is not None
        voters = set(before.round.votes)
        if isinstance(event, Voted):
            voters.add(event.node)
        assert len(votes) == len(voters)
        assert has_quorum(voters, record.weights)


def rejected(effects: list[Effect]) -> str:
    """Return ``code: reason`` of the only rejection among ``effects``."""
    (refusal,) = (effect for effect in effects if isinstance(effect, Rejected))
    return f"{refusal.code}: {refusal.reason}"


def started(count: int = 4, **changes: object) -> tuple[Leader, list[str]]:
    """Return a leader whose ``count`` members have just received the plan of round 1."""
    members = nodes(count)
    leader = Leader(replace(RULES, start_members=count, min_members=1, **changes))
    leader.arrive(members, GENESIS)
    assert leader.plan.round == 1
    return leader, members


def kinds(effects: list) -> list[type]:
    return [type(effect) for effect in effects]


__all__ = ["Leader", "Left", "contribution", "kinds", "nodes", "peer_id", "rejected", "root_after", "started"]
