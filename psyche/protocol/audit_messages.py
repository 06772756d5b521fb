"""Messages of auditors, and the audit state in a record (``protocol/audits.py`` has the rules)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from msgspec import Meta

from psyche.numerics.digest import digest
from psyche.protocol.wire import Body, Hash, Message, Natural, NodeId, Nodes, Positive, Signed

JURY = 15
"""The most auditors of one contribution."""
MAX_AUDITS = 4096
MOST = 10**9
"""Stands in a :class:`Finding` for larger numbers and those that are not finite."""
SKETCH = 64
"""The most numbers in a sketch: enough to estimate the relative distance of two to about an eighth."""


class Finding(Message, frozen=True):
    """The result of replaying a contribution (``audit_outcome.py`` decides what follows)."""

    outcome: Literal["measured", "false", "unserved"]
    """``measured``: replayed, with ``error``. ``false``: something that must agree bit for bit does not. ``unserved``:
    the audited node did not provide what it committed to."""
    error: Annotated[int, Meta(ge=0, le=MOST)]
    """‖Δ − Δ'‖ / ‖Δ'‖ of the worst segment, in millionths."""
    segment: Natural
    """Number of that segment, for anyone who wants to repeat it."""
    gain: Annotated[int, Meta(ge=-MOST, le=MOST)]
    """How much the contribution alone lowers the held-out loss, in millionths of a nat per token. Affects pay only."""
    noise: Annotated[int, Meta(ge=0, le=MOST)] = MOST
    """The difference between two precisions in the worst segment, like ``error``. Juries measure it; ``MOST``
    otherwise."""
    sketch: Annotated[tuple[Annotated[int, Meta(ge=-MOST, le=MOST)], ...], Meta(max_length=SKETCH)] = ()
    """Displacements of some parameters midway, in 10⁻⁹ (``audit/probes.py``), which only a node that replays can know.
    It says something about the auditor, not about the contribution."""


class Verdict(Body, frozen=True):
    """An auditor's verdict. Its digest is on record before it is revealed, so that no auditor can copy another."""

    DOMAIN = "verdict"

    accused: NodeId
    round: Positive
    finding: Finding
    salt: Hash

    @property
    def digest(self) -> bytes:
        return digest("verdict", self.encode())


class SealedVerdict(Body, frozen=True):
    """The digest of a verdict that will be revealed later."""

    DOMAIN = "sealed-verdict"

    accused: NodeId
    round: Positive
    digest: Hash


class DeclinedAudit(Body, frozen=True):
    """An auditor cannot do an audit, for example because it no longer holds the base state. The next candidate is asked
    in the round after."""

    DOMAIN = "declined-audit"

    accused: NodeId
    round: Positive


AuditStatement = SealedVerdict | Verdict | DeclinedAudit
"""A message of an auditor on an audit. All have ``accused`` and ``round``."""


class Opinion(Message, frozen=True):
    """An auditor's part in an audit so far."""

    auditor: NodeId
    digest: Hash
    finding: Finding | None
    """None until it is revealed."""


class Audit(Message, frozen=True):
    """A contribution under audit."""

    accused: NodeId
    round: Positive
    tokens: Positive
    """Tokens of the contribution."""
    looks: Positive
    """The number of auditors needed."""
    since: Positive
    """The round in whose record ``looks`` was last decided."""
    candidates: Annotated[tuple[NodeId, ...], Meta(max_length=JURY)]
    """The nodes that may be asked, in this order: drawn by voting weight."""
    weights: Annotated[tuple[Positive, ...], Meta(max_length=JURY)]
    """The voting weight of each candidate when it was drawn; a jury decides by it."""
    opinions: Annotated[tuple[Opinion, ...], Meta(max_length=JURY)]
    """Opinions in the order in which they came on record."""
    declined: Annotated[tuple[NodeId, ...], Meta(max_length=JURY)] = ()
    """Candidates that declined, in that order. They are not asked again."""

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
    """An audit that ended."""

    accused: NodeId
    round: Positive
    outcome: Outcome
    paid: Nodes
    """Auditors whose finding agrees with the outcome, ascending. They earn the tokens of the contribution."""
    lied: Nodes
    """Auditors that contradicted a jury, or whose sketch differs from the jury's, ascending. They are convicted."""
    gain: Annotated[int, Meta(ge=-MOST, le=MOST)]
    """The median gain found by the paid auditors; 0 if there is none."""


class Auditable(Message, frozen=True):
    """A contribution that can be audited."""

    node: NodeId
    tokens: Positive


class Pool(Message, frozen=True):
    """The contributions of a round that audits are drawn from."""

    seed: Hash
    """See ``protocol/audits.py: seed_of``."""
    given: Annotated[tuple[Auditable, ...], Meta(max_length=MAX_AUDITS)]
    """Ascending by node."""

    def of(self, node: str) -> Auditable | None:
        """Return the contribution of ``node``, or None."""
        return next((one for one in self.given if one.node == node), None)


class AuditState(Message, frozen=True):
    """The audits of a run, as a record leaves them. What is said is the coordinator's choice; what follows is not."""

    statements: Annotated[tuple[Signed, ...], Meta(max_length=MAX_AUDITS)]
    """Signed statements (:data:`AuditStatement`) that came on record here."""
    audits: Annotated[tuple[Audit, ...], Meta(max_length=MAX_AUDITS)]
    """Open audits, including those drawn in this record, ascending by round and accused."""
    closed: Annotated[tuple[Closed, ...], Meta(max_length=MAX_AUDITS)]
    """Audits that ended in this record, in the same order."""
    suspects: Nodes
    """Nodes whose contribution to the round before was an outlier, as its receivers report, ascending. It is likely to
    be audited; nothing else follows."""
    banned: Nodes
    """Nodes convicted in this run, which no plan may name. Ascending."""
    pool: Pool
    """The pool of this round, whose outliers are known when the next record is made."""


EMPTY = AuditState((), (), (), (), (), Pool(bytes(32), ()))
