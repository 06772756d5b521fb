"""Everything nodes say to each other, as bounded, typed, canonical msgpack.

A message travels as the ``body`` of a signed envelope (``protocol/wire.py``), which carries the run id,
the round and the author; the envelope's domain is the message's ``DOMAIN``. Bounds here are part of the
format: what does not fit is refused while decoding.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cached_property
from typing import Annotated, Literal, get_args

from msgspec import Meta

from psyche.numerics.digest import digest
from psyche.protocol.audit_messages import AuditState, AuditStatement
from psyche.protocol.wire import (
    MAX_COORDINATORS,
    MAX_MEMBERS,
    Body,
    Hash,
    Message,
    Natural,
    NodeId,
    Nodes,
    Positive,
    Reason,
    Signed,
)

# ------------------------------------------------------------------------------- what a round is


class Member(Message, frozen=True):
    """One node's part in a round: how many inner steps it owes, and how much its vote counts."""

    node: NodeId
    inner_steps: Positive
    votes: Natural


ExchangeKind = Literal["gather", "sharded"]


class Plan(Message, frozen=True):
    """What round ``round`` is to be. ``position`` is the first sequence of the data order it consumes."""

    round: Positive
    term: Positive
    previous: Hash
    """Hash of the last certified record; the run id before the first."""
    base_root: Hash
    seed: Hash
    position: Natural
    exchange: ExchangeKind
    """``gather``: every member aggregates every payload. ``sharded``: each slice is reduced by ``reducers`` members."""
    reducers: Natural
    """Members that reduce each slice of a sharded round; 0 in a gathered one."""
    members: Annotated[tuple[Member, ...], Meta(min_length=1, max_length=MAX_MEMBERS)]

    @property
    def is_sharded(self) -> bool:
        """Whether reducers add the payloads up."""
        return self.exchange == "sharded"

    def member(self, node: str) -> Member | None:
        """Return the part of ``node`` in the round, or None."""
        return next((m for m in self.members if m.node == node), None)


WITHHELD = digest("withheld")
"""In place of a hash that would say something of private data: who guesses a text could compare hashes."""


class Contribution(Body, frozen=True):
    """A node's work in one round. Its hash is committed before it is shown (DESIGN §6)."""

    DOMAIN = "contribution"

    base_root: Hash
    data_digest: Hash
    """Of the sequences trained on; :data:`WITHHELD` where ``private``."""
    base_proof: Hash
    """That the base state is at hand, which its root alone does not say: ``protocol/contributions.py``."""
    trace_root: Hash
    """Of parameters and inner optimizer at the trace points; :data:`WITHHELD` where ``private``."""
    residual_in: Hash
    """Address of the error-feedback buffer before it was encoded (the range of the round's fragment), and"""
    residual_out: Hash
    """after. The codec has none, or it is ``private``: :data:`WITHHELD`."""
    payload_root: Hash
    """Address of the payload: a blob with a chunk for each slice, so that this message has one size for any model."""
    payload_bytes: Positive
    """All slices together."""
    inner_steps: Positive
    overlap_steps: Natural
    """How many of the inner steps were taken before the outer step of the round before was known."""
    tokens: Positive
    private: bool
    """Trained on the node's own data, which nobody can check: its weight is capped (``protocol/contributions.py``)."""
    payout: Annotated[bytes, Meta(max_length=20)]
    """Address that the node's credits are to be paid to, 20 bytes as on Ethereum; empty: none was given."""
    salt: Hash

    def commitment(self, node: str, run_id: bytes, round_number: int) -> bytes:
        """H(node, run, round, everything above), 32 bytes."""
        return digest("commitment", node.encode(), run_id, round_number.to_bytes(8, "little"), self.encode())


class Accepted(Message, frozen=True):
    """A contribution that takes part in the outer step, weighted by its tokens."""

    node: NodeId
    contribution: Contribution


class ExclusionReason(StrEnum):
    """Why a member's contribution takes no part in the outer step. ``telemetry/lines.py`` has the sentences."""

    NO_COMMITMENT = "no-commitment"
    """No commitment arrived before the deadline."""
    NOT_REVEALED = "not-revealed"
    """The commitment was not revealed before the deadline."""
    NOT_HELD = "not-held"
    """The payload reached too few members before the deadline."""
    LOST_CONTACT = "lost-contact"
    """The coordinator had not heard from the member for longer than ``silence``, whatever it had done before."""


class Excluded(Message, frozen=True):
    """A member whose contribution takes no part in the outer step, and why."""

    node: NodeId
    reason: ExclusionReason


class Standing(Message, frozen=True):
    """How far a node is past its probation, and how long its work has gone unchecked."""

    node: NodeId
    rounds: Positive
    """In which its contribution was accepted; counted no further than the probation."""
    last: Positive
    """Of them."""
    audited: Natural
    """The last of them whose contribution an audit was drawn for; 0: none was."""


class Record(Body, frozen=True, dict=True):
    """What happened in a round. Chained by ``plan.previous``; final once certified."""

    DOMAIN = "record"

    plan: Plan
    accepted: Annotated[tuple[Accepted, ...], Meta(min_length=1, max_length=MAX_MEMBERS)]
    excluded: Annotated[tuple[Excluded, ...], Meta(max_length=MAX_MEMBERS)]
    reconfiguration: Natural
    """0: the electorate is the ``voters`` of the record before. Otherwise a reconfiguration: the number of the roster
    that named the electorate, the first of the run's first round being one, too."""
    electorate: Nodes
    """Whose votes are counted."""
    voters: Nodes
    """The electorate of the next round."""
    standing: Annotated[tuple[Standing, ...], Meta(max_length=MAX_MEMBERS)]
    """Of who has contributed to this round or an earlier one; nobody's where there is neither probation nor audits."""
    audit_state: AuditState
    reducer_order: Nodes
    """Who reduced, in the order of ``protocol/reduction.py``; nobody where everybody aggregates."""
    results: Annotated[tuple[Hash, ...], Meta(max_length=MAX_MEMBERS)]
    """Of each group on the ring the address of its encoded aggregate: a blob with a chunk for each of its slices."""
    dissenters: Nodes
    """Reducers that reported another result than the one believed."""

    @cached_property
    def hash(self) -> bytes:
        return digest("record", self.encode())

    @property
    def is_reconfiguration(self) -> bool:
        """Whether others voted than those whom the record before named. The first round's voters replace nobody."""
        return self.reconfiguration > 0 and self.plan.round > 1


# ---------------------------------------------------------------------- member to coordinator


class Reconfiguration(Body, frozen=True):
    """A reconfiguration: who votes in a round from now on, whatever was said of its electorate before.

    In force once more than half of the coordinators have signed it; each signs one of a number, and none any more
    once it has sealed a record of the round.
    """

    DOMAIN = "reconfiguration"

    previous: Hash
    """Hash of the record before the round."""
    number: Positive
    """Counts the rosters of a round."""
    electorate: Annotated[Nodes, Meta(min_length=1)]


class Seal(Body, frozen=True):
    """A coordinator's word that it takes ``record`` for the one of its round, and will sign no later roster."""

    DOMAIN = "seal"

    previous: Hash
    reconfiguration: Natural
    record: Hash


class SigningRefused(Body, frozen=True):
    """Why a coordinator does not sign a roster or a seal: what it has signed of the round before."""

    DOMAIN = "signing-refused"

    reason: Reason
    reconfiguration: Natural
    """Number of a roster that stands in the way; a later one would not. 0: there is none."""
    sealed: Hash | None
    """Of a record that does."""


class Certificate(Body, frozen=True):
    """A certified record: the coordinator's signed proposal, the signed votes for it, and the seals."""

    DOMAIN = "certificate"

    proposal: Signed
    votes: Annotated[tuple[Signed, ...], Meta(max_length=MAX_MEMBERS)]
    seals: Annotated[tuple[Signed, ...], Meta(max_length=MAX_COORDINATORS)]


class Hello(Body, frozen=True):
    """I am here, with this state. Sent on joining and after every resynchronisation."""

    DOMAIN = "hello"

    rounds: Natural
    """Certified rounds this node has applied."""
    head: Hash
    state_root: Hash
    device: Annotated[str, Meta(max_length=64)]
    claim: Signed | None
    """A coordinator's signed heartbeat or proposal of the latest term that this node took part in: one that begins to
    lead in an earlier term learns that it is not heard."""
    certificate: Certificate | None
    """That of the last round applied, for a coordinator that starts again; none before the first."""


class Commitment(Body, frozen=True):
    DOMAIN = "commitment"

    digest: Hash
    term: Positive
    """Of the plan: a round that is tried again takes no commitment to the work of the first attempt."""


class Have(Body, frozen=True):
    """Whose payloads of this round the sender has fetched, checked, and serves to others."""

    DOMAIN = "have"

    nodes: Nodes


class Result(Message, frozen=True):
    """The address of a group's encoded aggregate."""

    group: Natural
    root: Hash


class ReductionReport(Body, frozen=True):
    """What the sender found for groups that it reduces, from the contributions selected in ``term``."""

    DOMAIN = "reduction-report"

    term: Positive
    results: Annotated[tuple[Result, ...], Meta(max_length=MAX_MEMBERS)]


class Vote(Body, frozen=True):
    DOMAIN = "vote"

    term: Positive
    record: Hash


class Heartbeat(Body, frozen=True):
    """A coordinator's word whether it leads, and in which term; 0: it does not."""

    DOMAIN = "heartbeat"

    term: Natural
    latest: Natural
    """The highest term it has used or heard of."""
    finished: bool = False
    """It has seen the last round certified: there is nothing to lead any more."""


class Promise(Body, frozen=True):
    """The sender takes part in nothing that was begun before ``term``; and what it last voted for, if anything.

    With what a new leader needs to go on with the round that the sender is in.
    """

    DOMAIN = "promise"

    term: Positive
    rounds: Natural
    """Certified rounds the sender has applied."""
    accepted: Signed | None
    """The proposal it voted for in the highest term so far."""
    plan: Plan | None
    """Of the round it is in."""
    commitments: Annotated[tuple[Signed, ...], Meta(max_length=MAX_MEMBERS)]
    """As it was shown them when commitments were closed; none before."""
    contributions: Annotated[tuple[Signed, ...], Meta(max_length=MAX_MEMBERS)]


class Attestation(Body, frozen=True):
    """The sender's state_root after the certified round."""

    DOMAIN = "attestation"

    state_root: Hash
    suspects: Nodes
    """Whose payloads stood out, as far as the sender has seen them (``numerics/outliers.py``), ascending."""


class Leave(Body, frozen=True):
    DOMAIN = "leave"

    reason: Reason


MAX_METRICS = 64


class Metrics(Body, frozen=True):
    """What a member measured in a round, by name. People read it; no rule of the protocol does.

    The names and their bounds are in ``psyche/telemetry/metrics.py``: a node ignores names that it does not know, so
    nodes of different versions can report different metrics.
    """

    DOMAIN = "metrics"

    values: Annotated[dict[Annotated[str, Meta(max_length=48)], Natural | float], Meta(max_length=MAX_METRICS)]


# ---------------------------------------------------------------------- coordinator to members


class Proposal(Body, frozen=True):
    """A record put to the vote in a term. Higher terms supersede lower ones."""

    DOMAIN = "proposal"

    term: Positive
    record: Record
    reconfiguration: Annotated[tuple[Signed, ...], Meta(max_length=MAX_COORDINATORS)]
    """Signatures under the roster that the record names."""


class ReductionStatus(Message, frozen=True):
    """Who reduces what of a sharded round, and, once that is known, which contributions."""

    term: Natural
    reducer_order: Nodes
    failed: Nodes
    reassigned: Annotated[tuple[Natural, ...], Meta(max_length=MAX_MEMBERS)]
    selected: Nodes
    """None until it is known whose payloads are there; then ``term`` is above 0."""


class RunStatus(Body, frozen=True):
    """All that a member needs to know of the run now. Members ask for it; nothing is pushed to them."""

    DOMAIN = "run-status"

    version: Natural
    term: Positive
    """In which its author leads. Who follows it takes part in nothing of an earlier term any more."""
    claim: Signed
    """That it does: a heartbeat."""
    phase: Annotated[str, Meta(max_length=16)]
    rounds: Natural
    """Certified so far."""
    state_root: Hash
    """What a node must hold after those rounds; the genesis root before the first."""
    plan: Plan | None
    allowed: Annotated[float, Meta(ge=0)]
    """Seconds from the plan to the deadline for commitments, if nobody asks for more; 0 where none are taken."""
    mostly_done: bool
    """Who has not committed yet holds up more than half of the others."""
    commitments: Annotated[tuple[Signed, ...], Meta(max_length=MAX_MEMBERS)]
    contributions: Annotated[tuple[Signed, ...], Meta(max_length=MAX_MEMBERS)]
    reducing: ReductionStatus | None
    proposal: Signed | None
    certificate: Certificate | None
    """Of round ``rounds``."""
    note: Annotated[str, Meta(max_length=500)]
    """What is waited for, or why the run is paused or finished, in words."""


SUBMISSIONS: dict[str, type[Body]] = {
    kind.DOMAIN: kind
    for kind in (
        Hello,
        Promise,
        Commitment,
        Contribution,
        Have,
        ReductionReport,
        Vote,
        Attestation,
        *get_args(AuditStatement),
        Leave,
        Metrics,
    )
}
"""What a member may send to a coordinator, by domain."""
