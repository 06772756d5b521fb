"""A member's promise as the state machine takes it: every signature in it checked first."""

from __future__ import annotations

from psyche.config import Manifest
from psyche.network.identity import open_envelope
from psyche.protocol import envelope as envelopes
from psyche.protocol.certificates import check_proposal
from psyche.protocol.messages import Commitment, Contribution, Plan, Promise, decode
from psyche.protocol.state import Promised


def promised(node: str, body: Promise, manifest: Manifest) -> Promised:
    """``body`` of ``node``. Raises ``BadCertificate``, ``MalformedMessage``, ``BadSignature`` or ``WrongContext``."""
    accepted, accepted_in, plan = None, 0, body.plan
    roster: tuple[bytes, ...] = ()
    if body.accepted is not None:
        proposal = check_proposal(
            envelopes.decode(body.accepted),
            run_id=manifest.run_id,
            coordinators=manifest.resolved.coordinators,
            open_envelope=open_envelope,
        )
        accepted, accepted_in, roster = proposal.record, proposal.term, proposal.roster
    of = accepted.plan if accepted is not None and accepted.plan.round == body.rounds + 1 else plan
    return Promised(
        node=node,
        term=body.term,
        rounds=body.rounds,
        accepted=accepted,
        accepted_in=accepted_in,
        roster=roster,
        plan=plan,
        commitments=_commitments(body.commitments, of, manifest.run_id),
        contributions=_contributions(body.contributions, of, manifest.run_id),
    )


def _commitments(items: tuple[bytes, ...], plan: Plan | None, run_id: bytes) -> dict[str, tuple[bytes, bytes]]:
    """Commitments to work on ``plan``."""
    found = {}
    for item in items if plan is not None else ():
        assert plan is not None
        envelope = envelopes.decode(item)
        open_envelope(envelope, domain=Commitment.DOMAIN, run_id=run_id, round=plan.round)
        made = decode(Commitment, envelope.body)
        if made.term == plan.term and plan.member(envelope.author) is not None:
            found[envelope.author] = made.digest, item
    return found


def _contributions(items: tuple[bytes, ...], plan: Plan | None, run_id: bytes) -> dict[str, tuple[Contribution, bytes]]:
    found = {}
    for item in items if plan is not None else ():
        assert plan is not None
        envelope = envelopes.decode(item)
        open_envelope(envelope, domain=Contribution.DOMAIN, run_id=run_id, round=plan.round)
        if plan.member(envelope.author) is not None:
            found[envelope.author] = decode(Contribution, envelope.body), item
    return found
