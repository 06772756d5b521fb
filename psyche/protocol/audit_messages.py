"""What auditors say, and what a record says of audits (``protocol/audits.py`` has the rules)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from msgspec import Meta

from psyche.numerics.digest import digest
from psyche.protocol.wire import Body, Hash, Message, Natural, NodeId, Nodes, Positive, Signed

JURY = 15
"""Auditors of one contribution at most, where those before them disagree."""
MAX_AUDITS = 4096
MOST = 10**9
"""What a :class:`Finding` says of numbers that are larger, or not finite."""
SKETCH = 64
"""Numbers of the way in a finding, at most: two honest ones' relative distance comes out right to about an eighth."""


class Finding(Message, frozen=True):
    """What an auditor found when it did a contribution's work again (``protocol/audits.py`` says what follows)."""

    outcome: Literal["measured", "false", "unserved"]
    """``measured``: replayed, and ``error`` says how far apart. ``false``: something that has to agree to the bit does
    not. ``unserved``: its author did not hand over what it committed to."""
    error: Annotated[int, Meta(ge=0, le=MOST)]
    """‖Δ − Δ'‖ / ‖Δ'‖ of the worst segment, in millionths."""
    segment: Natural
    """Number of that segment: what anybody has to run again who doubts it."""
    gain: Annotated[int, Meta(ge=-MOST, le=MOST)]
    """By how much the contribution alone lowers the held-out loss, in millionths of a nat a token. For pay, never for
    judgement."""
    noise: Annotated[int, Meta(ge=0, le=MOST)] = MOST
    """How far apart two precisions are in the segment where they are farthest, as ``error``; the most where nobody
    looked: a jury does."""
    sketch: Annotated[tuple[Annotated[int, Meta(ge=-MOST, le=MOST)], ...], Meta(max_length=SKETCH)] = ()
    """How far some parameters had come on the way, in 10⁻⁹ (``audit/probes.py``): who knows has trained. Of an
    auditor, never of the contribution."""


class Verdict(Body, frozen=True):
    """An auditor's word on a contribution. Its digest is on record before it is shown, so that none copies another."""

    DOMAIN = "verdict"

    accused: NodeId
    round: Positive
    finding: Finding
    salt: Hash

    @property
    def digest(self) -> bytes:
        return digest("verdict", self.encode())


class SealedVerdict(Body, frozen=True):
    """That a verdict has been reached, not which."""

    DOMAIN = "sealed-verdict"

    accused: NodeId
    round: Positive
    digest: Hash


class DeclinedAudit(Body, frozen=True):
    """Signed by a node that was asked to audit a contribution and cannot: it no longer holds the base state, say. The
    next candidate is asked in the round after."""

    DOMAIN = "declined-audit"

    accused: NodeId
    round: Positive


AuditStatement = SealedVerdict | Verdict | DeclinedAudit
"""What an auditor says of an audit. All have ``accused`` and ``round``."""


class Opinion(Message, frozen=True):
    """An auditor's part in an audit so far."""

    auditor: NodeId
    digest: Hash
    finding: Finding | None
    """None until it is shown."""


class Audit(Message, frozen=True):
    """A contribution that is being done again."""

    accused: NodeId
    round: Positive
    tokens: Positive
    """Of the contribution."""
    looks: Positive
    """How many auditors are wanted, and"""
    since: Positive
    """the round in whose record that was last decided."""
    candidates: Annotated[tuple[NodeId, ...], Meta(max_length=JURY)]
    """The nodes that may be asked, in this order: drawn by voting weight."""
    weights: Annotated[tuple[Positive, ...], Meta(max_length=JURY)]
    """The voting weight of each candidate when it was drawn; a jury decides by it."""
    opinions: Annotated[tuple[Opinion, ...], Meta(max_length=JURY)]
    """In the order in which they came on record."""
    declined: Annotated[tuple[NodeId, ...], Meta(max_length=JURY)] = ()
    """Candidates that cannot do it, in the order in which they said so. They are not asked again."""

    def weight(self, nodes: Iterable[str]) -> int:
        """Return the voting weight of those of ``nodes`` that are candidates."""
        known = dict(zip(self.candidates, self.weights, strict=True))
        return sum(known.get(node, 0) for node in set(nodes))

    @property
    def able(self) -> tuple[NodeId, ...]:
        """The candidates that have not declined, in the order in which they are asked."""
        return tuple(node for node in self.candidates if node not in self.declined)


Outcome = Literal["passed", "inconclusive", "convicted", "unserved", "dropped"]


class Closed(Message, frozen=True):
    """How an audit ended."""

    accused: NodeId
    round: Positive
    outcome: Outcome
    paid: Nodes
    """Auditors whose word agrees with how it ended, ascending: they are paid for the work as if they had done it."""
    lied: Nodes
    """Auditors who said the opposite of what a jury found, or show another way than it does, ascending."""
    gain: Annotated[int, Meta(ge=-MOST, le=MOST)]
    """The median of what those who are paid found; 0 where nobody found any."""


class Auditable(Message, frozen=True):
    """A contribution that can be audited."""

    node: NodeId
    tokens: Positive


class Pool(Message, frozen=True):
    """A round's contributions, as far as audits are drawn from them."""

    seed: Hash
    """See ``protocol/audits.py: seed_of``."""
    given: Annotated[tuple[Auditable, ...], Meta(max_length=MAX_AUDITS)]
    """Ascending by node."""

    def of(self, node: str) -> Auditable | None:
        """That of ``node``."""
        return next((one for one in self.given if one.node == node), None)


class AuditState(Message, frozen=True):
    """The audits of a run, as a record leaves them. What is said is the coordinator's choice; what follows is not."""

    statements: Annotated[tuple[Signed, ...], Meta(max_length=MAX_AUDITS)]
    """Signed statements (:data:`AuditStatement`) that came on record here."""
    audits: Annotated[tuple[Audit, ...], Meta(max_length=MAX_AUDITS)]
    """Open ones, those drawn from this record among them, ascending by round and accused."""
    closed: Annotated[tuple[Closed, ...], Meta(max_length=MAX_AUDITS)]
    """Ones that ended here, in the same order."""
    suspects: Nodes
    """Whose contribution to the round before stood out from the others', as their receivers say, ascending. It is
    audited, probably, and that is all that comes of it."""
    banned: Nodes
    """Convicted in this run: no plan names them any more. Ascending."""
    pool: Pool
    """Of this round: who stood out in it is known when the next record is made."""


EMPTY = AuditState((), (), (), (), (), Pool(bytes(32), ()))
