"""Voting weight: a moving average of each node's share of the verified work. A key is free, so a key has no power.

Everything that is counted in the protocol (votes, reconfigurations, state roots, suspicions, juries, deadlines, places
among reducers) is counted in the weights of this module. A record carries everybody's :class:`Standing`, so each voter,
and anybody with the ledger, computes the next weights from the record alone:

- The founders, who are the electorate of round 1, start with equal weights.
- A contribution's tokens are *pending* until they can no longer be challenged. ``1/window`` of a node's pending tokens
  matures in each round, which spreads them over the challenge window without keeping a list of rounds.
- Each round, every weight moves by :data:`STEP` towards the node's share of the tokens that mature. So at most ``STEP``
  of the whole changes hands in a round, and at most 1 − (1 − 1/256)³² = 11.8 % in 32 rounds, whatever anybody does in
  them: weight cannot be bought in a rush. Absence costs a node the same share of its weight.
- Conviction takes all weight. Work on private data, which nobody can check, gives none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from psyche.protocol.audit_messages import AuditState
from psyche.protocol.audits import audited_tokens
from psyche.protocol.messages import Accepted, Plan, Record, Standing
from psyche.protocol.round_state import Rules
from psyche.protocol.wire import MAX_MEMBERS

FOUNDER_WEIGHT = 1 << 32
"""The weight of a node that was there when the run began. Only ratios count; this leaves room for integer division."""
STEP = Fraction(1, 256)
"""The share of a weight that moves in a round. The largest inverse power of two with at most 1/8 in 32 rounds."""
LEAST_SHARE = Fraction(1, 1 << 20)
"""A smaller share of the whole is rounded to nothing, so that the electorate does not grow with all who ever came."""

Weights = Mapping[str, int]
"""Voting weight by node; nodes without weight are left out."""


def weights_of(standing: Iterable[Standing]) -> dict[str, int]:
    """Return the voting weights after a record, in ascending order of node."""
    return {one.node: one.weight for one in standing if one.weight}


def weights_before(standing: Iterable[Standing], plan: Plan) -> dict[str, int]:
    """Return the voting weights in the round of ``plan``; all members of round 1 are founders."""
    return weights_of(standing) or founding_weights(member.node for member in plan.members)


def founding_weights(nodes: Iterable[str]) -> dict[str, int]:
    """Return the voting weights of round 1."""
    return dict.fromkeys(sorted(nodes), FOUNDER_WEIGHT)


def restricted(weights: Weights, nodes: Iterable[str]) -> dict[str, int]:
    """Return the weights of those of ``nodes`` that have one, in ascending order of node."""
    return {node: weights[node] for node in sorted(set(nodes) & weights.keys())}


def total(weights: Weights, nodes: Iterable[str] | None = None) -> int:
    """Return the weight of ``nodes`` together, or of all."""
    return sum(weights.values()) if nodes is None else sum(weights.get(node, 0) for node in set(nodes))


def quorum(yes: int, whole: int) -> bool:
    """Return whether ``yes`` is more than two thirds of ``whole``."""
    return 3 * yes > 2 * whole


def at_least_half(yes: int, whole: int) -> bool:
    """Return whether ``yes`` is half of ``whole`` or more, and not nothing."""
    return whole > 0 and 2 * yes >= whole


def has_quorum(nodes: Iterable[str], weights: Weights) -> bool:
    """Return whether ``nodes`` have more than two thirds of the weight."""
    return quorum(total(weights, nodes), total(weights))


def keeps_half(electorate: Iterable[str], weights: Weights) -> bool:
    """Return whether a reconfiguration to ``electorate`` keeps half of the weight or more."""
    return at_least_half(total(weights, electorate), total(weights))


def standing_after(
    before: Sequence[Standing],
    *,
    plan: Plan,
    electorate: Weights,
    accepted: Sequence[Accepted],
    audit_state: AuditState,
    audits_before: AuditState,
    rules: Rules,
) -> tuple[Standing, ...]:
    """Return everybody's standing after the round of ``plan``, in ascending order of node.

    ``electorate`` are the weights that the round was voted with. Voters that are not in it keep theirs, unless it is
    that of a reconfiguration after more than half of the weight had vanished. Then only it and those who contributed
    continue; the others return as anybody does, by working.
    """
    round_number = plan.round
    known = {one.node: one for one in before}
    weights = weights_before(before, plan)
    if not keeps_half(electorate, weights):
        weights = restricted(weights, {*electorate, *(one.node for one in accepted)})
    banned = set(audit_state.banned)
    pending = Counter({one.node: one.pending for one in before if one.node not in banned})
    rounds = {one.node: one.rounds for one in before}
    quota = {member.node: member.inner_steps for member in plan.members}
    for one in accepted:
        if not one.contribution.private:
            pending[one.node] += one.contribution.tokens * (one.node not in banned)
        full = one.contribution.inner_steps >= quota[one.node]
        rounds[one.node] = min(rounds.get(one.node, 0) + full, max(1, rules.probation))
    tokens = audited_tokens(audits_before)
    for closed in audit_state.closed:
        pending.update(dict.fromkeys(closed.paid, tokens.get((closed.accused, closed.round), 0)))
        if closed.outcome == "unserved":
            pending[closed.accused] -= min(pending[closed.accused], tokens.get((closed.accused, closed.round), 0))
    window = max(1, rules.audits.window if rules.audits.rate else 1)
    matured = {
        node: count // window
        for node, count in pending.items()
        if node not in banned and (node in weights or rounds.get(node, 0) >= rules.probation)
    }
    weights = _moved({node: weight for node, weight in weights.items() if node not in banned}, matured)
    contributed = {one.node for one in accepted}
    withheld = {one.node: one.withheld for one in before}
    audited = dict.fromkeys(newly_audited(audit_state, round_number), round_number)
    for closed in audit_state.closed:
        if closed.outcome == "unserved":
            withheld[closed.accused] = withheld.get(closed.accused, 0) + 1
        elif closed.outcome == "passed":
            withheld[closed.accused] = 0
        elif closed.outcome == "dropped":  # nobody looked, so that the next audit is overdue
            audited.setdefault(closed.accused, 0)
    found = []
    for node in {*known, *contributed, *weights, *pending}:
        old = known.get(node)
        found.append(
            Standing(
                node,
                rounds.get(node, 0),
                round_number if node in contributed else (old.last if old else 0),
                audited.get(node, old.audited if old else 0),
                withheld.get(node, 0),
                pending[node] - matured.get(node, 0),
                weights.get(node, 0),
            )
        )
    kept = sorted(found, key=lambda one: (-one.weight, -one.last, one.node))[:MAX_MEMBERS]
    return tuple(sorted(kept, key=lambda one: one.node))


def _moved(weights: Weights, matured: Weights) -> dict[str, int]:
    """Return the weights after one step towards the shares of ``matured`` tokens."""
    whole, tokens = total(weights), total(matured)
    if not tokens:
        return dict(weights)
    least = whole * LEAST_SHARE
    moved = {
        node: weights.get(node, 0)
        + (whole * matured.get(node, 0) // tokens - weights.get(node, 0)) * STEP.numerator // STEP.denominator
        for node in {*weights, *matured}
    }
    return {node: weight for node, weight in moved.items() if weight > 0 and weight >= least}


def probation_note(record: Record, node: str, probation: int) -> str | None:
    """Return a sentence for the owner of ``node`` about its voting weight; None if it had weight, or did nothing."""
    mine = next((one for one in record.standing if one.node == node), None)
    if mine is None or mine.last < record.plan.round or node in record.electorate:
        return None
    if mine.weight:
        return "this node now has voting weight; it grows with each round of verified work"
    return f"on probation: {min(mine.rounds, probation)} of {probation} full contributions accepted"


def _plan_fault(record: Record, weights: Weights, audits_before: AuditState) -> str | None:
    """Return what is wrong with the voting weights in the plan of ``record``, or None.

    ``weights`` and ``audits_before`` are of the record before. Members of the plan, and voters that audit meanwhile,
    must have half of the electorate's weight or more; so no leader gets rid of voters by not planning them.
    """
    given = {member.node: member.votes for member in record.plan.members if member.votes}
    if given != restricted(weights, [member.node for member in record.plan.members]):
        return "the plan's voting weights are not those of the record before"
    auditing = {node for audit in audits_before.audits for node in audit.candidates}
    if not at_least_half(total(record.weights, {*given, *auditing}), total(record.weights)):
        return "the plan leaves out more than half of the voting weight"
    return None


def _electorate_fault(record: Record, weights: Weights) -> str | None:
    """Return what is wrong with the electorate of ``record``, or None. ``weights`` are of the record before."""
    if record.reconfiguration:
        named = restricted(weights, record.electorate)
        return None if named == record.weights else "the reconfiguration names nodes without voting weight"
    if record.weights != weights:
        return "the electorate is not that of the record before, and no reconfiguration names another"
    return None


def standing_fault(record: Record, before: Sequence[Standing], audits_before: AuditState, rules: Rules) -> str | None:
    """Return what is wrong with the voting weights in ``record``, or None, given the record before."""
    weights = weights_before(before, record.plan)
    if fault := _electorate_fault(record, weights) or _plan_fault(record, weights, audits_before):
        return fault
    due = standing_after(
        before,
        plan=record.plan,
        electorate=record.weights,
        accepted=record.accepted,
        audit_state=record.audit_state,
        audits_before=audits_before,
        rules=rules,
    )
    return None if record.standing == due else "the standing of nodes does not follow from the record before"


def newly_audited(audit_state: AuditState, round_number: int) -> frozenset[str]:
    """Return the nodes whose contribution, to this round or the one before, was drawn for an audit in this round."""
    return frozenset(
        audit.accused for audit in audit_state.audits if audit.since == round_number and not audit.opinions
    )
