"""The coordinator's state, what can happen to it, and what it asks to be done. Data only; rules in rounds.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from psyche.protocol.audit_messages import EMPTY, AuditState, AuditStatement
from psyche.protocol.messages import Contribution, Plan, Record, Standing
from psyche.protocol.wire import RefusalCode


class Phase(StrEnum):
    ELECTING = "electing"
    """Published only: this coordinator begins to lead and does not know yet which round to resume."""
    WAITING = "waiting"
    """Waiting for enough members to plan a round."""
    TRAINING = "training"
    COMMITTING = "committing"
    """The first commitment is in; closes when all living members have committed, or at the deadline."""
    CERTIFYING = "certifying"
    """Contributions are revealed, fetched, proposed, voted on, applied and attested."""
    PAUSED = "paused"
    FINISHED = "finished"


@dataclass(frozen=True)
class AuditRules:
    """``run.audits`` in configs/README.md explains each."""

    rate: float = 0.0
    second: float = 0.0
    patience: int = 1
    window: int = 1
    pass_error: int = 0
    """Relative error up to which a finding passes, in millionths."""
    fail_error: int = 1


@dataclass(frozen=True)
class Rules:
    """The settings of the manifest that the state machine uses."""

    run_id: bytes
    genesis: bytes
    rounds: int
    inner_steps: int
    overlap_steps: int
    """The most inner steps that may be taken while the previous round is on the wire."""
    batch_size: int
    tokens_per_step: int
    payload_bytes: int
    """The largest payload, in bytes."""
    slices: tuple[int, ...]
    """Number of slices of each fragment."""
    reducers: int
    """Nodes that reduce each slice where a round is sharded."""
    sharded_from: int | None
    """Number of members from which rounds are sharded; None: all rounds are gathered."""
    start_members: int
    min_members: int
    round_bounds: tuple[float, float]
    exchange_bounds: tuple[float, float]
    silence: float
    probation: int
    """Accepted contributions before a node has a vote."""
    private_share: float
    """The largest share of an outer step's weight for all private contributions together; 0: none are accepted."""
    audits: AuditRules
    coordinators: int
    """Number of coordinators in the manifest. A term belongs to the one at place ``term % coordinators``."""

    def reducers_for(self, members: int) -> int:
        """Return ``Plan.reducers`` of a round with so many members."""
        return 0 if self.sharded_from is None or members < self.sharded_from else min(self.reducers, members)

    def slices_in(self, round_number: int) -> int:
        """Return the number of slices that the round exchanges."""
        return self.slices[(round_number - 1) % len(self.slices)]


@dataclass(frozen=True)
class Peer:
    """A node that is here. Only one whose ``state_root`` is the run's is given work."""

    seen: float
    state_root: bytes
    device: str
    rounds: int
    """The round after which it holds that state, as it claims."""


class Stage(StrEnum):
    """What a round in progress waits for."""

    COMMITTING = "committing"
    """Members train and commit to their work."""
    REVEALING = "revealing"
    """Members reveal what they committed to, and fetch each other's payloads."""
    REDUCING = "reducing"
    """The reducers of a sharded round report the results of the selected contributions."""
    VOTING = "voting"
    """The electorate votes on the record of the open ballot."""
    ATTESTING = "attesting"
    """The record is certified; members apply it and attest the state they have reached."""


@dataclass(frozen=True)
class Reduction:
    """The reducers of a sharded round, and the results reported so far."""

    reducer_order: tuple[str, ...]
    """All reducers of the round, in the order drawn from its seed."""
    term: int = 0
    """The term in which contributions were selected, which every report names; 0 before."""
    since: float = 0.0
    """When the reduction began, or began anew with other reducers."""
    selected: frozenset[str] = frozenset()
    """Nodes whose contributions are reduced; nobody's before the selection."""
    failed: frozenset[str] = frozenset()
    """Reducers that are gone, silent, or without the payloads they need."""
    reassigned: tuple[int, ...] = ()
    """Groups whose reducers contradict each other; each time a group stands here, one more node reduces it."""
    lacking: Mapping[int, Mapping[str, frozenset[str]]] = field(default_factory=dict)
    """Selected contributions that a node could not fetch for a group, by group and node."""
    reports: Mapping[int, Mapping[str, bytes]] = field(default_factory=dict)
    """Reported results, by group and reducer."""
    have_results: frozenset[str] = frozenset()
    """Nodes that voted on results of this selection, and so hold all of them."""


@dataclass(frozen=True)
class Ballot:
    """A record put to the vote, in a term of its own (Paxos: a ballot)."""

    record: Record
    since: float
    """When the vote began."""
    votes: Mapping[str, bytes] = field(default_factory=dict)
    """Signed votes, by voter."""


@dataclass(frozen=True)
class Round:
    """One round in progress. Mappings go from node id; ``bytes`` after a value is its signed envelope."""

    plan: Plan
    opened: float
    """When the round was planned, or resumed by a new leader."""
    deadline: float
    """When the present stage is over, whoever is missing."""
    stage: Stage = Stage.COMMITTING
    term: int = 0
    """The latest term used in this round: of the plan, then of the selection, then of the open ballot."""
    awaited: frozenset[str] = frozenset()
    """Members of a round begun under another leader that this leader has not heard from yet."""
    commitments: Mapping[str, tuple[bytes, bytes]] = field(default_factory=dict)
    committed_at: Mapping[str, float] = field(default_factory=dict)
    """When each member committed; empty where another leader began the round and the durations are unknown."""
    closed: float = 0.0
    """When commitments were closed, the end of ``COMMITTING``."""
    contributions: Mapping[str, tuple[Contribution, bytes]] = field(default_factory=dict)
    """Revealed contributions."""
    holdings: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Nodes whose payloads each member has fetched and checked."""
    held_at: Mapping[str, float] = field(default_factory=dict)
    """When each member last reported a change of its holdings."""
    reduction: Reduction | None = None
    """None in a gathered round, and before commitments are closed."""
    ballot: Ballot | None = None
    """None before the first, and while lost results are reduced again."""
    ballots: int = 0
    """Ballots opened so far."""
    certified_at: float = 0.0
    attestations: Mapping[str, bytes] = field(default_factory=dict)
    """State roots that members attest after the round."""
    suspected: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Nodes whose payloads stood out, as each attesting member reports."""

    @property
    def begun_here(self) -> bool:
        """Whether this leader planned the round; until a record is proposed, which takes a later term."""
        return self.term == self.plan.term

    @property
    def proposal(self) -> Record | None:
        """The record of the open ballot."""
        return None if self.ballot is None else self.ballot.record

    @property
    def votes(self) -> Mapping[str, bytes]:
        """The votes of the open ballot."""
        return {} if self.ballot is None else self.ballot.votes

    @property
    def certified(self) -> bool:
        return self.stage is Stage.ATTESTING


@dataclass(frozen=True)
class Promised:
    """A voter's promise to a new leader: it takes part in nothing of an earlier term.

    ``bytes`` after a value are its author's signed envelope; all signatures were checked by the coordinator.
    """

    node: str
    term: int
    rounds: int
    """Rounds it has applied."""
    accepted: Record | None = None
    """The record it voted for last, in term ``accepted_term``."""
    accepted_term: int = 0
    reconfiguration: tuple[bytes, ...] = ()
    """Signatures of the reconfiguration that ``accepted`` names."""
    plan: Plan | None = None
    """Plan of the round it is in."""
    commitments: Mapping[str, tuple[bytes, bytes]] = field(default_factory=dict)
    """The commitments published when they closed."""
    contributions: Mapping[str, tuple[Contribution, bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """``lead_term`` is the term in which this coordinator began to lead; its plans and proposals have later ones."""

    phase: Phase
    rounds: int
    """Rounds that are certified and whose state is agreed on."""
    head: bytes
    """Hash of the last certified record; the run id before the first."""
    state_root: bytes
    """State root members must hold now; empty after a restart until two thirds of the electorate are back and agree."""
    position: int
    term: int
    lead_term: int = 1
    promises: Mapping[str, Promised] = field(default_factory=dict)
    """Promises of the term ``lead_term``, by node."""
    resumed: bool = False
    """Whether the round that members were in under the previous leader has been resumed."""
    electorate: tuple[str, ...] = ()
    """The voters of the next round: the last record's ``voters``, or those of the last reconfiguration."""
    standing: tuple[Standing, ...] = ()
    """Standing in the last record."""
    audit_state: AuditState = EMPTY
    """Audit state of the last record."""
    audit_statements: Mapping[tuple[str, str, int, str], StatementReceived] = field(default_factory=dict)
    """Auditors' statements that are not on record yet, by author, accused, round and kind."""
    suspects: frozenset[str] = frozenset()
    """Nodes whose contribution to the last round was an outlier."""
    reconfiguration: int = 0
    """Number of the reconfiguration in force; 0: none."""
    last_reconfiguration: int = 0
    """Highest number of a reconfiguration of this round; each is used once."""
    replaced: tuple[tuple[str, ...], int] | None = None
    """The electorate, and the number of its reconfiguration, that the last reconfiguration replaces."""
    maybe_certified: bytes = b""
    """Hash of a record that may have been certified under an earlier leader. Another record needs a reconfiguration."""
    last_arrival: float | None = None
    """When the last new node arrived."""
    peers: Mapping[str, Peer] = field(default_factory=dict)
    left_voters: frozenset[str] = frozenset()
    """Voters that have left and not come back: nobody waits for their votes."""
    round: Round | None = None
    commit_seconds: tuple[float, ...] = ()
    exchange_seconds: tuple[float, ...] = ()
    reduce_seconds: tuple[float, ...] = ()
    """Seconds from a selection to a reducer's report."""
    result_seconds: tuple[float, ...] = ()
    """Seconds from the proposal of results to a vote; in between they are fetched."""
    speeds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Measured speeds of nodes that are here or were in the last round (``pacing.py``)."""
    last_steps: Mapping[str, int] = field(default_factory=dict)
    """Inner steps of each member of the last round."""
    force_gather: bool = False
    """The sharded attempt at this round failed: the next attempt is gathered."""
    note: str = ""

    @classmethod
    def initial(cls, rules: Rules, lead_term: int = 1) -> State:
        return cls(Phase.WAITING, 0, rules.run_id, rules.genesis, 0, term=lead_term, lead_term=lead_term)


# --------------------------------------------------------------------------------------- events
# The coordinator has checked signatures, run id and envelope round before it makes an event.


@dataclass(frozen=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True)
class Arrived:
    node: str
    state_root: bytes
    device: str
    rounds: int


@dataclass(frozen=True)
class Seen:
    node: str


@dataclass(frozen=True)
class Left:
    node: str
    reason: str


@dataclass(frozen=True)
class Committed:
    node: str
    round: int
    term: int
    """Term of the plan that was worked on."""
    digest: bytes
    proof: bytes


@dataclass(frozen=True)
class Revealed:
    node: str
    round: int
    contribution: Contribution
    proof: bytes


@dataclass(frozen=True)
class Fetched:
    node: str
    round: int
    nodes: frozenset[str]


@dataclass(frozen=True)
class Reported:
    node: str
    round: int
    term: int
    results: Mapping[int, bytes]


@dataclass(frozen=True)
class Voted:
    node: str
    round: int
    term: int
    record: bytes
    proof: bytes


@dataclass(frozen=True)
class Attested:
    node: str
    round: int
    state_root: bytes
    suspects: frozenset[str] = frozenset()


@dataclass(frozen=True)
class StatementReceived:
    """An auditor's statement on a contribution of any round; ``proof`` is its signed envelope."""

    node: str
    body: AuditStatement
    proof: bytes

    @property
    def key(self) -> tuple[str, int]:
        """Accused node and round, which identify an audit."""
        return self.body.accused, self.body.round


@dataclass(frozen=True)
class Restored:
    """A member proved a later certified record than this coordinator knows, for example after a restart."""

    record: Record


@dataclass(frozen=True)
class SignatureConflict:
    """A coordinator does not sign for ``record``, because it has signed something that conflicts.

    Either a later reconfiguration than the one that the record is under, or the seal of another record.
    """

    record: bytes
    """Hash of the record."""
    reconfiguration: int = 0
    sealed: bytes = b""
    """Hash of the other, sealed record. Nothing else can be certified."""


@dataclass(frozen=True)
class CosignersUnreachable:
    """Too few coordinators answer to sign the reconfiguration of ``record``; this one has not signed it either."""

    record: bytes
    """Hash of the record."""


Submission = Committed | Revealed | Fetched | Reported | Voted | Attested
"""Messages of a member about a round in progress."""
Event = (
    Tick
    | SignatureConflict
    | CosignersUnreachable
    | Arrived
    | Seen
    | Left
    | Promised
    | Submission
    | StatementReceived
    | Restored
)


# -------------------------------------------------------------------------------------- effects


@dataclass(frozen=True)
class Rejected:
    """The event changed nothing; the coordinator refuses it with ``code`` and a sentence."""

    node: str
    code: RefusalCode
    reason: str


@dataclass(frozen=True)
class Planned:
    plan: Plan


@dataclass(frozen=True)
class Abandoned:
    """The round ended without a record and will be planned again."""

    round: int
    reason: str


@dataclass(frozen=True)
class Proposed:
    term: int
    record: Record


@dataclass(frozen=True)
class Certified:
    record: Record
    votes: tuple[bytes, ...]
    seconds: float


@dataclass(frozen=True)
class StateAgreed:
    """More than half of the members attested the same state after round ``round``."""

    round: int
    state_root: bytes


@dataclass(frozen=True)
class Diverged:
    node: str
    round: int
    expected: bytes
    found: bytes


@dataclass(frozen=True)
class Departed:
    node: str
    reason: str


@dataclass(frozen=True)
class Finished:
    rounds: int


Effect = Rejected | Planned | Abandoned | Proposed | Certified | StateAgreed | Diverged | Departed | Finished
