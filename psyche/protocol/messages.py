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
    """One node's part in a round: its quota of inner steps and its voting weight."""

    node: NodeId
    inner_steps: Positive
    votes: Natural
    """Voting weight (``protocol/standing.py``); 0: none yet."""


ExchangeKind = Literal["gather", "sharded"]


class Plan(Message, frozen=True):
    """The plan of round ``round``: members, base state, data and exchange. ``position`` is its first data position."""

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

    @property
    def weights(self) -> dict[str, int]:
        """Voting weight of each member that has one."""
        return {member.node: member.votes for member in self.members if member.votes}

    def member(self, node: str) -> Member | None:
        """Return the part of ``node`` in the round, or None."""
        return next((m for m in self.members if m.node == node), None)


WITHHELD = digest("withheld")
"""Stands for a hash of private data, which would let anyone who guesses a text compare hashes."""


class Contribution(Body, frozen=True):
    """A node's work in one round. The node commits to its hash before it reveals the contribution."""

    DOMAIN = "contribution"

    base_root: Hash
    data_digest: Hash
    """Digest of the sequences trained on; :data:`WITHHELD` where ``private``."""
    base_proof: Hash
    """Proof that the author holds the base state, which its root alone does not show (``base_proof``)."""
    trace_root: Hash
    """Root of parameters and inner optimizer at the trace points; :data:`WITHHELD` where ``private``."""
    residual_in: Hash
    """Address of the error-feedback buffer before encoding, in the range of the round's fragment.

    :data:`WITHHELD` where the codec has no error feedback, and where ``private``.
    """
    residual_out: Hash
    """The same after encoding."""
    payload_root: Hash
    """Address of the payload: a blob with a chunk for each slice, so that this message has one size for any model."""
    payload_bytes: Positive
    """Bytes of all slices."""
    inner_steps: Positive
    overlap_steps: Natural
    """Inner steps that were taken before the outer step of the previous round was known."""
    tokens: Positive
    private: bool
    """Trained on the node's own data, which nobody can check: its weight is capped (``protocol/contributions.py``)."""
    payout: Annotated[bytes, Meta(max_length=20)]
    """Address to pay the node's credits to: 20 bytes as on Ethereum, or empty."""
    salt: Hash

    def commitment(self, node: str, run_id: bytes, round_number: int) -> bytes:
        """H(node, run, round, everything above), 32 bytes."""
        return digest("commitment", node.encode(), run_id, round_number.to_bytes(8, "little"), self.encode())


NO_COMMITMENT = bytes(32)
"""Stands in a record for the commitment of a voter that made none in time."""


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
    """What the chain says of a node that has worked or voted: its probation, its audits, its voting weight."""

    node: NodeId
    rounds: Natural
    """Rounds in which its contribution was accepted with all inner steps of its quota, counted up to the probation."""
    last: Natural
    """The last round in which a contribution was accepted; 0: none was."""
    audited: Natural
    """The last round whose contribution was drawn for an audit; 0: none yet."""
    withheld: Natural
    """Audits in a row for which it did not hand over its work."""
    pending: Natural
    """Tokens of accepted work that have not yet matured into voting weight (``protocol/standing.py``)."""
    weight: Natural
    """Voting weight in the next round."""


class Record(Body, frozen=True, dict=True):
    """What happened in a round. Chained by ``plan.previous``; final once certified."""

    DOMAIN = "record"

    plan: Plan
    accepted: Annotated[tuple[Accepted, ...], Meta(min_length=1, max_length=MAX_MEMBERS)]
    excluded: Annotated[tuple[Excluded, ...], Meta(max_length=MAX_MEMBERS)]
    reconfiguration: Natural
    """0: the electorate is the ``voters`` of the previous record. Otherwise the number of the reconfiguration that
    named the electorate. The first round of a run always has one."""
    electorate: Nodes
    """The nodes whose votes are counted, ascending."""
    voting_weights: Annotated[tuple[Positive, ...], Meta(max_length=MAX_MEMBERS)]
    """The voting weight of each node of the electorate."""
    standing: Annotated[tuple[Standing, ...], Meta(max_length=MAX_MEMBERS)]
    """Everybody's standing after the round, ascending by node. Those with weight are the next electorate."""
    audit_state: AuditState
    commitments: Annotated[tuple[Hash, ...], Meta(max_length=MAX_MEMBERS)]
    """In a sharded round, the commitment of each voter in the plan when commitments closed, or
    :data:`NO_COMMITMENT`. The reducer order is drawn from them."""
    reducer_order: Nodes
    """The reducers in their drawn order (``protocol/assignment.py``); empty in a gathered round."""
    results: Annotated[tuple[Hash, ...], Meta(max_length=MAX_MEMBERS)]
    """For each group, the address of its encoded aggregate: a blob with a chunk for each slice."""
    dissenters: Nodes
    """Reducers that reported another result than the majority."""

    @cached_property
    def hash(self) -> bytes:
        return digest("record", self.encode())

    @cached_property
    def weights(self) -> dict[str, int]:
        """Voting weight of each node of the electorate."""
        return dict(zip(self.electorate, self.voting_weights, strict=True))

    @cached_property
    def voters(self) -> tuple[str, ...]:
        """The electorate of the next round, if no reconfiguration names another. Ascending."""
        return tuple(one.node for one in self.standing if one.weight)

    @property
    def is_reconfiguration(self) -> bool:
        """Whether the voters are not those that the previous record named. False in the first round, which has none."""
        return self.reconfiguration > 0 and self.plan.round > 1


# ---------------------------------------------------------------------- member to coordinator


class Reconfiguration(Body, frozen=True):
    """A new electorate for a round, replacing any named before.

    In force once more than half of the coordinators have signed it. A coordinator signs one reconfiguration of each
    number, and none after it has sealed a record of the round.
    """

    DOMAIN = "reconfiguration"

    previous: Hash
    """Hash of the record before the round."""
    number: Positive
    """Counts the reconfigurations of a round."""
    electorate: Annotated[Nodes, Meta(min_length=1)]


class Seal(Body, frozen=True):
    """A coordinator's commit seal for ``record``: it will sign no later reconfiguration of the round."""

    DOMAIN = "seal"

    previous: Hash
    reconfiguration: Natural
    record: Hash


class SigningRefused(Body, frozen=True):
    """Why a coordinator does not sign a reconfiguration or a seal: it has signed something that conflicts."""

    DOMAIN = "signing-refused"

    reason: Reason
    reconfiguration: Natural
    """Number of the conflicting reconfiguration; a later number would not conflict. 0: there is none."""
    sealed: Hash | None
    """Hash of the conflicting record."""


class Certificate(Body, frozen=True):
    """A certified record: the coordinator's signed proposal, the signed votes for it, and the seals."""

    DOMAIN = "certificate"

    proposal: Signed
    votes: Annotated[tuple[Signed, ...], Meta(max_length=MAX_MEMBERS)]
    seals: Annotated[tuple[Signed, ...], Meta(max_length=MAX_COORDINATORS)]


class Hello(Body, frozen=True):
    """Introduces a node and the state it holds. Sent on joining and after every resynchronisation."""

    DOMAIN = "hello"

    rounds: Natural
    """Certified rounds this node has applied."""
    head: Hash
    state_root: Hash
    device: Annotated[str, Meta(max_length=64)]
    claim: Signed | None
    """Signed heartbeat or proposal of the latest term this node took part in. A coordinator that leads in an earlier
    term learns from it that members no longer follow it."""
    certificate: Certificate | None
    """Certificate of the last round applied, for a coordinator that has restarted; None before the first."""


class Commitment(Body, frozen=True):
    DOMAIN = "commitment"

    digest: Hash
    term: Positive
    """Term of the plan: a round that is planned again takes no commitments to the first attempt."""


class Have(Body, frozen=True):
    """The nodes whose payloads of this round the sender has fetched, checked, and serves to others."""

    DOMAIN = "have"

    nodes: Nodes


class Result(Message, frozen=True):
    """The address of a group's encoded aggregate."""

    group: Natural
    root: Hash


class ReductionReport(Body, frozen=True):
    """The sender's results for groups that it reduces, from the contributions selected in ``term``."""

    DOMAIN = "reduction-report"

    term: Positive
    results: Annotated[tuple[Result, ...], Meta(max_length=MAX_MEMBERS)]


class Vote(Body, frozen=True):
    DOMAIN = "vote"

    term: Positive
    record: Hash


class Heartbeat(Body, frozen=True):
    """Whether a coordinator leads, and in which term; 0: it does not lead."""

    DOMAIN = "heartbeat"

    term: Natural
    latest: Natural
    """The highest term it has used or heard of."""
    finished: bool = False
    """The coordinator has seen the last round certified: the run is over."""


class Promise(Body, frozen=True):
    """Paxos promise: the sender takes part in nothing of a term before ``term``.

    Carries what the sender last voted for, and what a new leader needs to resume the round that the sender is in.
    """

    DOMAIN = "promise"

    term: Positive
    rounds: Natural
    """Certified rounds the sender has applied."""
    accepted: Signed | None
    """The proposal it voted for in the highest term so far."""
    plan: Plan | None
    """Plan of the round it is in."""
    commitments: Annotated[tuple[Signed, ...], Meta(max_length=MAX_MEMBERS)]
    """The commitments of the round as published when they closed; empty before."""
    contributions: Annotated[tuple[Signed, ...], Meta(max_length=MAX_MEMBERS)]


class Attestation(Body, frozen=True):
    """The sender's state_root after the certified round."""

    DOMAIN = "attestation"

    state_root: Hash
    suspects: Nodes
    """Nodes whose payloads are outliers among those the sender has seen (``numerics/outliers.py``), ascending."""


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
    """Signatures of the reconfiguration that the record names."""


class ReductionStatus(Message, frozen=True):
    """The reducers of a sharded round, and the contributions once they are selected."""

    term: Natural
    reducer_order: Nodes
    failed: Nodes
    reassigned: Annotated[tuple[Natural, ...], Meta(max_length=MAX_MEMBERS)]
    selected: Nodes
    """Empty until contributions are selected; ``term`` is above 0 from then on."""


class RunStatus(Body, frozen=True):
    """The state of the run as its leader publishes it. Members poll for it with ``watch``; nothing is pushed."""

    DOMAIN = "run-status"

    version: Natural
    term: Positive
    """Term in which the author leads. A member that follows it takes part in nothing of an earlier term."""
    claim: Signed
    """The author's signed heartbeat for that term."""
    phase: Annotated[str, Meta(max_length=16)]
    rounds: Natural
    """Rounds certified so far."""
    state_root: Hash
    """State root after those rounds; the genesis root before the first."""
    plan: Plan | None
    allowed: Annotated[float, Meta(ge=0)]
    """Seconds from the plan to the deadline for commitments; 0 where none are taken."""
    mostly_done: bool
    """More than half of the other members wait for those that have not committed yet."""
    commitments: Annotated[tuple[Signed, ...], Meta(max_length=MAX_MEMBERS)]
    contributions: Annotated[tuple[Signed, ...], Meta(max_length=MAX_MEMBERS)]
    reducing: ReductionStatus | None
    proposal: Signed | None
    certificate: Certificate | None
    """Certificate of round ``rounds``."""
    attestations: Annotated[tuple[Signed, ...], Meta(max_length=MAX_MEMBERS)]
    """Signed :class:`Attestation` or :class:`Hello` messages of voters who hold ``state_root`` after that round."""
    note: Annotated[str, Meta(max_length=500)]
    """A sentence for people: what the run waits for, or why it is paused or finished."""


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
