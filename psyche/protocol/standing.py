"""Who has a vote: identities are free, accepted work is not (probation).

A member votes once ``probation`` of its contributions were accepted; until then its work counts and its word does not.
Who votes in a round is past it, so that the first members of a run, and those whom a reconfiguration names because
nobody else is left, need no one before them. A record says how far everybody has got, and each voter has checked that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from psyche.protocol.audit_messages import AuditState
from psyche.protocol.audits import busy
from psyche.protocol.messages import Record, Standing
from psyche.protocol.round_state import Rules
from psyche.protocol.wire import MAX_MEMBERS


def standing_after(
    before: Sequence[Standing],
    *,
    round_number: int,
    electorate: Iterable[str],
    accepted: Iterable[str],
    audited: Collection[str],
    rules: Rules,
) -> tuple[Standing, ...]:
    """How far nodes have got after round ``round``, in ascending order of node.

    ``audited`` are those of whose contribution an audit was drawn. Who stays away loses nothing; of more nodes than a
    round has members, those who were accepted last are remembered.
    """
    if not rules.probation and not rules.audits.rate:
        return ()
    probation = max(1, rules.probation)
    reached = {one.node: one for one in before}
    voting = set(electorate)
    for node in accepted:
        rounds, last = (reached[node].rounds, reached[node].audited) if node in reached else (0, 0)
        counted = probation if node in voting else min(rounds + 1, probation)
        reached[node] = Standing(node, counted, round_number, round_number if node in audited else last)
    latest = sorted(reached.values(), key=lambda one: (-one.last, one.node))[:MAX_MEMBERS]
    return tuple(sorted(latest, key=lambda one: one.node))


def voting(
    nodes: Iterable[str], *, standing: Sequence[Standing], electorate: Collection[str], probation: int
) -> list[str]:
    """Those of ``nodes`` who have a vote, in ascending order: in the electorate already, or past their probation."""
    if not probation:
        return sorted(set(nodes))
    past = {one.node for one in standing if one.rounds >= probation}
    return sorted(set(nodes) & (past | set(electorate)))


def probation_note(record: Record, node: str, probation: int) -> str | None:
    """What ``record`` means for the vote of ``node``, for whoever runs it; None where it had one, or did nothing."""
    mine = next((one for one in record.standing if one.node == node), None)
    if mine is None or mine.last < record.plan.round or node in record.electorate:
        return None
    if mine.rounds < probation:
        return f"on probation: {mine.rounds} of {probation} contributions accepted; then this node has a vote"
    return "past its probation: this node has a vote from the next round on"


def votes_fault(record: Record, *, standing: Sequence[Standing], voters: Collection[str], probation: int) -> str | None:
    """What is wrong with whom the plan of ``record`` gives a vote, or None: who has none is a newcomer, whose weight is
    capped (``protocol/contributions.py``).

    ``standing`` and ``voters``: what the record before says. A reconfiguration may give a vote to those it names.
    """
    members = [member.node for member in record.plan.members]
    given = {member.node for member in record.plan.members if member.votes}

    def may_vote(electorate: Collection[str]) -> set[str]:
        return set(voting(members, standing=standing, electorate=electorate, probation=probation))

    if given == may_vote(voters):
        return None
    if record.reconfiguration and may_vote(()) <= given <= may_vote({*voters, *record.electorate}):
        return None
    return "the plan gives votes to others than those who are past their probation"


def standing_fault(record: Record, before: Sequence[Standing], audit_state: AuditState, rules: Rules) -> str | None:
    """What is wrong with how far ``record`` says that nodes have got, and whom it lets vote next, or None.

    ``before`` and ``audit_state``: what the record before says.
    """
    accepted = [one.node for one in record.accepted]
    electorate, banned = record.electorate, set(record.audit_state.banned)
    standing = standing_after(
        before,
        round_number=record.plan.round,
        electorate=electorate,
        accepted=accepted,
        audited=newly_audited(record.audit_state, record.plan.round),
        rules=rules,
    )
    if record.standing != standing:
        return "how far nodes are past their probation does not follow from the record before"

    def may_vote(nodes: Iterable[str]) -> list[str]:
        return voting(set(nodes) - banned, standing=standing, electorate=electorate, probation=rules.probation)

    members = {member.node for member in record.plan.members}
    members |= busy(audit_state, record.plan.round, rules.audits) & set(electorate)
    if list(record.voters) != may_vote(set(record.voters) & members):
        return "the voters of the next round are not members of this one, past their probation, in ascending order"
    if not set(may_vote(accepted)) <= set(record.voters):
        return "who contributed and is past its probation is left without a vote"
    return None


def newly_audited(audit_state: AuditState, round_number: int) -> frozenset[str]:
    """Of whose contribution, to ``round`` or the one before, an audit was drawn in ``round``."""
    return frozenset(
        audit.accused for audit in audit_state.audits if audit.since == round_number and not audit.opinions
    )
