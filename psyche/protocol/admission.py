"""Applies events to the coordinator's state, or refuses them with a code and a reason.

No node sets its own weight, and a message changes only what belongs to its sender.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from psyche.protocol.assignment import assignment_of, next_position
from psyche.protocol.audit_messages import AuditState
from psyche.protocol.audits import admissible
from psyche.protocol.contributions import contribution_fault
from psyche.protocol.messages import Record
from psyche.protocol.pacing import done_in, measured, observed
from psyche.protocol.round_state import (
    Abandoned,
    Arrived,
    Attested,
    Committed,
    CosignersUnreachable,
    Departed,
    Effect,
    Event,
    Fetched,
    Left,
    Peer,
    Phase,
    Promised,
    Rejected,
    Reported,
    Restored,
    Revealed,
    Round,
    Rules,
    Seen,
    SignatureConflict,
    Stage,
    State,
    StatementReceived,
    Submission,
    Tick,
    Voted,
)
from psyche.protocol.standing import restricted, total
from psyche.protocol.wire import RefusalCode

Step = tuple[State, list[Effect]]
Refusal = tuple[RefusalCode, str]
"""A code for programs, and a sentence for people."""
BANNED = "this node was convicted of cheating and is banned from this run; psyche ledger why says what it did"
V = TypeVar("V")


def apply_event(rules: Rules, state: State, event: Event, now: float) -> Step:
    """Return the state after ``event``, before the transitions that follow from it."""
    match event:
        case Tick():
            return state, []
        case Seen(node):
            peer = state.peers.get(node)
            return (state, []) if peer is None else (with_peer(state, node, replace(peer, seen=now)), [])
        case Arrived(node) | StatementReceived(node) if node in state.audit_state.banned:
            return state, [Rejected(node, RefusalCode.BANNED, BANNED)]
        case StatementReceived():
            return _hear(rules, state, event)
        case Arrived(node, state_root, device, rounds):
            if node not in state.peers:
                state = replace(state, last_arrival=now)
            state = replace(state, left_voters=state.left_voters - {node})
            return with_peer(state, node, Peer(now, state_root, device[:64], rounds)), []
        case Left(node, reason) if node in state.peers:
            proposal = state.round.proposal if state.round else None
            if node in state.electorate or (proposal and node in proposal.voters):
                state = replace(state, left_voters=state.left_voters | {node})
            return without_peer(state, node), [Departed(node, reason)]
        case Left():
            return state, []
        case Promised():
            return _promise(state, event)
        case Restored(record):
            return _restore(rules, state, record)
        case SignatureConflict() | CosignersUnreachable():
            return state, []  # rounds.py
        case _:
            if refusal := _refusal(rules, state, event):
                return state, [Rejected(event.node, *refusal)]
            return _accept(state, event, now), []


def _hear(rules: Rules, state: State, event: StatementReceived) -> Step:
    """Keep an auditor's statement until it is on record. Statements on audits that have ended are dropped.

    A member that has applied a certified round refers to that round's record, which may be a moment before this
    coordinator has counted the attestations.
    """
    audit_state, round_number = state.audit_state, state.rounds + 1
    if (current := state.round) is not None and current.certified and current.proposal is not None:
        audit_state, round_number = current.proposal.audit_state, round_number + 1
    if all((audit.accused, audit.round) != event.key for audit in audit_state.audits):
        return state, []
    if next(admissible(audit_state, [event], round_number, rules.audits), None) is None:
        reason = f"verdict on {event.body.accused[-6:]}, round {event.body.round}: this node has no audit of it open"
        return state, [Rejected(event.node, RefusalCode.NO_OPEN_AUDIT, reason)]
    name = event.node, *event.key, event.body.DOMAIN
    return replace(state, audit_statements={**state.audit_statements, name: event}), []


def _refusal(rules: Rules, state: State, event: Submission) -> Refusal | None:
    """Return why a member's message about a round is refused, or None."""
    current = state.round
    if current is None or current.plan.round != event.round:
        return RefusalCode.WRONG_ROUND, f"round {event.round} is not open: {state.rounds} rounds are certified"
    # Nodes that only follow a round may attest, too: that is how a newcomer gets into the next plan. They may vote, if
    # the previous record named them: a quorum may need a voter that was not ready when the round was planned.
    follows = isinstance(event, (Attested, Voted)) and event.node in state.peers
    if current.plan.member(event.node) is None and not follows:
        return RefusalCode.NOT_A_MEMBER, f"not a member of round {event.round}"
    if isinstance(event, Committed):
        if event.term != current.plan.term:
            return RefusalCode.WRONG_TERM, f"round {event.round} was planned again since"
        if current.stage is not Stage.COMMITTING:
            return RefusalCode.TOO_LATE, f"the deadline for commitments of round {event.round} has passed"
        if current.commitments.get(event.node, (event.digest,))[0] != event.digest:
            return RefusalCode.CONFLICT, "a different commitment was already made in this round"
        return None
    if current.stage is Stage.COMMITTING:
        return RefusalCode.TOO_EARLY, f"commitments of round {event.round} are not closed yet"
    match event:
        case Revealed():
            return _bad_opening(rules, current, event)
        case Attested() if not current.certified:
            return RefusalCode.TOO_EARLY, f"round {event.round} is not certified yet"
        case Reported():
            return _bad_report(rules, current, event)
        case Voted():
            if current.proposal is None or event.term != current.term:
                return RefusalCode.WRONG_TERM, f"no proposal of term {event.term} is open"
            if event.record != current.proposal.hash:
                return RefusalCode.INVALID, "the vote names another record than was proposed"
            if event.node not in current.proposal.electorate:
                return RefusalCode.NOT_A_MEMBER, "not in the electorate"
    return None


def _bad_report(rules: Rules, current: Round, event: Reported) -> Refusal | None:
    reduction = current.reduction
    if current.stage is not Stage.REDUCING or reduction is None or event.term != reduction.term:
        return RefusalCode.WRONG_TERM, f"nothing is being reduced in term {event.term}"
    assignment = assignment_of(rules, current.plan, reduction)
    if not set(event.results) <= set(assignment.duties(event.node)):
        return RefusalCode.INVALID, "the report names groups that its sender does not reduce"
    if any(reduction.reports.get(g, {}).get(event.node, root) != root for g, root in event.results.items()):
        return RefusalCode.CONFLICT, "another result was reported before"
    return None


def _bad_opening(rules: Rules, current: Round, event: Revealed) -> Refusal | None:
    given, plan = event.contribution, current.plan
    member = plan.member(event.node)
    assert member is not None
    committed = current.commitments.get(event.node)
    if committed is None:
        return RefusalCode.TOO_LATE, "nothing was committed before the deadline"
    if given.commitment(event.node, rules.run_id, plan.round) != committed[0]:
        return RefusalCode.INVALID, "the contribution is not the one committed to"
    fault = contribution_fault(rules, plan, member, given)
    return None if fault is None else (RefusalCode.INVALID, fault)


def _accept(state: State, event: Submission, now: float) -> State:
    current = state.round
    assert current is not None
    node = event.node
    match event:
        case Committed():
            if node not in current.commitments:
                if current.plan.weights.get(node):
                    state = replace(state, commit_seconds=observed(state.commit_seconds, now - current.opened))
                if current.begun_here:
                    current = replace(current, committed_at=_put(current.committed_at, node, now))
            current = replace(current, commitments=_put(current.commitments, node, (event.digest, event.proof)))
        case Revealed():
            current = replace(
                current, contributions=_put(current.contributions, node, (event.contribution, event.proof))
            )
        case Fetched():
            held = event.nodes & {member.node for member in current.plan.members}
            if held != current.holdings.get(node):
                current = replace(
                    current,
                    holdings=_put(current.holdings, node, held),
                    held_at=_put(current.held_at, node, now),
                )
        case Reported():
            reduction = current.reduction
            assert reduction is not None
            if event.results and all(node not in found for found in reduction.reports.values()):
                state = replace(state, reduce_seconds=observed(state.reduce_seconds, now - reduction.since))
            reports = dict(reduction.reports)
            for group, root in event.results.items():
                reports[group] = _put(reports.get(group, {}), node, root)
            current = replace(current, reduction=replace(reduction, reports=reports))
        case Voted():
            ballot, reduction = current.ballot, current.reduction
            assert ballot is not None
            if reduction is not None:
                if node not in ballot.votes:
                    state = replace(state, result_seconds=observed(state.result_seconds, now - ballot.since))
                reduction = replace(reduction, have_results=reduction.have_results | {node})
            ballot = replace(ballot, votes=_put(ballot.votes, node, event.proof))
            current = replace(current, ballot=ballot, reduction=reduction)
        case Attested():
            current = replace(
                current,
                attestations=_put(current.attestations, node, event.state_root),
                suspected=_put(current.suspected, node, event.suspects),
            )
            if node in state.peers:
                there = replace(state.peers[node], state_root=event.state_root, rounds=event.round)
                state = with_peer(state, node, there)
    return replace(state, round=current)


def _promise(state: State, event: Promised) -> Step:
    """Keep a promise. A voter ahead of this coordinator must prove it first: it voted in a round unknown here."""
    if event.term != state.lead_term:
        return state, [
            Rejected(event.node, RefusalCode.WRONG_TERM, f"this coordinator does not lead in term {event.term}")
        ]
    known = state.rounds + (state.round is not None and state.round.certified)
    if max(event.rounds, event.accepted.plan.round - 1 if event.accepted else 0) > known:
        reason = f"the promise is ahead: this coordinator knows of {state.rounds} certified rounds"
        return state, [Rejected(event.node, RefusalCode.BEHIND, reason)]
    return replace(state, promises=_put(state.promises, event.node, event)), []


def _restore(rules: Rules, state: State, record: Record) -> Step:
    """Take over a longer certified history.

    It can only be this run's, from before a restart: a round opened meanwhile in ignorance of it is dropped. What this
    coordinator has certified itself stands.
    """
    if record.plan.round <= state.rounds:
        return state, []
    effects: list[Effect] = []
    if (current := state.round) is not None:
        if current.certified or record.plan.round < current.plan.round:
            return state, []
        effects.append(Abandoned(current.plan.round, f"round {record.plan.round} was certified before a restart"))
    restored = replace(state, phase=Phase.PAUSED, term=max(state.term, record.plan.term), resumed=False)
    return after_record(rules, restored, record, b""), effects


def after_record(rules: Rules, state: State, record: Record, state_root: bytes) -> State:
    """Return the state between ``record``'s round and the next one."""
    current = state.round
    if current is not None and current.plan == record.plan:
        state = replace(state, speeds=measured(state.speeds, current, record, state.peers))
    for node in set(record.audit_state.banned) & set(state.peers):
        state = without_peer(state, node)
    return replace(
        state,
        rounds=record.plan.round,
        head=record.hash,
        state_root=state_root,
        position=next_position(record.plan, rules.batch_size, rules.overlap_steps),
        electorate=record.voters,
        standing=record.standing,
        audit_state=record.audit_state,
        audit_statements={
            name: one for name, one in state.audit_statements.items() if _still_wanted(one, record.audit_state)
        },
        suspects=suspects_of(current, record),
        left_voters=state.left_voters & set(record.voters),
        reconfiguration=0,
        last_reconfiguration=0,
        replaced=None,
        maybe_certified=b"",
        round=None,
        last_steps=done_in(record),
        force_gather=False,
    )


def _still_wanted(statement: StatementReceived, audit_state: AuditState) -> bool:
    """Return whether a later record can hold the statement: it is not on record, and its audit is open."""
    open_audits = {(audit.accused, audit.round) for audit in audit_state.audits}
    return statement.key in open_audits and statement.proof not in audit_state.statements


def suspects_of(current: Round | None, record: Record) -> frozenset[str]:
    """Return the nodes whose contribution more than half of its receivers report as an outlier.

    Receivers count by voting weight. In a sharded round only the reducers of a slice see it, so there more than half of
    so many voters must name a node. A node that is named wrongly is audited, no more.
    """
    if current is None or current.plan != record.plan:
        return frozenset()
    weights = restricted(record.weights, current.suspected)
    if record.plan.is_sharded:
        weights = dict.fromkeys(weights, 1)
    seen_by = record.plan.reducers or total(weights)
    named: Counter[str] = Counter()
    for voter, weight in weights.items():
        named.update(dict.fromkeys(current.suspected[voter], weight))
    return frozenset(one.node for one in record.accepted if 2 * named[one.node] > seen_by)


# -------------------------------------------------------------------------------------- helpers


def with_peer(state: State, node: str, peer: Peer) -> State:
    """``peer`` in place of what was known of ``node``."""
    return replace(state, peers=_put(state.peers, node, peer))


def without_peer(state: State, node: str) -> State:
    """``node`` is gone."""
    return replace(state, peers={key: peer for key, peer in state.peers.items() if key != node})


def _put(mapping: Mapping[str, V], key: str, value: V) -> dict[str, V]:
    return {**mapping, key: value}
