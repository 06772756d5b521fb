"""How a coordinator that begins to lead goes on with what the one before it left: Paxos' first phase (DESIGN §6).

It knows nothing but what members tell it. It leads once more than two thirds of the electorate have promised to take
part in nothing of an earlier term. What one of them voted for may have been certified, and is put to the vote again;
a round that they are in the middle of goes on, with the commitments that they were shown.

(Lamport, Paxos Made Simple, 2001, §2.2. One leader's later proposals need no new promises: it alone makes certificates
of its proposals, and none any more of those that it has replaced.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from psyche.protocol.admission import Step
from psyche.protocol.messages import Plan, Record
from psyche.protocol.pacing import quota_fault, training_allowance
from psyche.protocol.proposals import (
    close_commitments,
    has_quorum,
    nodes_reporting,
    open_ballot,
    quorum,
    round_seed,
    short_names,
)
from psyche.protocol.round_state import Phase, Planned, Promised, Reduction, Round, Rules, State

PLANNED_SINCE = 16
"""Plans that the leader before can have made since the last vote, for all one believes: a plan carries no signature,
and no member is to drive terms up."""


def ready_members(state: State) -> list[str]:
    """Who is here with the run's state, and follows this leader."""
    return sorted(
        node for node, peer in state.peers.items() if peer.state_root == state.state_root and node in state.promises
    )


def with_note(state: State, phase: Phase, note: str) -> Step:
    """The same state, with what is waited for."""
    return (state, []) if (state.phase, state.note) == (phase, note) else (replace(state, phase=phase, note=note), [])


def is_overdue(rules: Rules, state: State, now: float) -> bool:
    """Whether who is missing had time to come back."""
    return state.last_arrival is not None and now - state.last_arrival > rules.silence


def agree_on_state(rules: Rules, state: State, now: float) -> Step:
    """Believe the state of more than two thirds of the electorate; or of who has it, where the others stay away.

    Only those count who have applied the last record: who has not is behind, however many they are.
    """
    back = {node: peer.state_root for node, peer in state.peers.items() if peer.rounds == state.rounds}
    voters = {node: root for node, root in back.items() if node in state.electorate}
    for root in sorted(set(voters.values())):
        if quorum(len(nodes_reporting(voters, root)), len(state.electorate)):
            return replace(state, state_root=root), []
    if is_overdue(rules, state, now):
        for root in sorted(set(back.values())):
            if quorum(len(nodes_reporting(back, root)), len(back)):
                return replace(state, state_root=root), []
    missing = set(state.electorate) - set(voters)
    behind = missing & set(state.peers)
    note = f"restarted after round {state.rounds}; waiting for members of that round: {short_names(missing or voters)}"
    if behind:
        note += f"; its state is not known to {short_names(behind)}, who are behind"
    return with_note(state, Phase.PAUSED, note)


def resume_round(rules: Rules, state: State, ready: Sequence[str], now: float) -> Step:
    """The round that is to come, as far as the members had got with it under another leader."""
    state = replace(state, resumed=True)
    promises = [promise for promise in state.promises.values() if promise.rounds == state.rounds]
    voted = [promise for promise in promises if promise.accepted and promise.accepted.plan.round == state.rounds + 1]
    if voted:
        last = max(voted, key=lambda promise: promise.accepted_term)
        assert last.accepted is not None
        return _vote_again(rules, state, last, last.accepted, ready, now)
    plans = Counter(
        promise.plan for promise in promises if promise.plan and _follows(rules, state, promise.plan, ready)
    )
    return _go_on(rules, state, plans.most_common(1)[0][0], promises, now) if plans else (state, [])


def _vote_again(rules: Rules, state: State, last: Promised, record: Record, ready: Sequence[str], now: float) -> Step:
    """Put ``record`` to the vote: more than two thirds may have voted for it already, and it cannot be known."""
    if record.reconfiguration > state.reconfiguration:
        state = replace(state, reconfiguration=record.reconfiguration, electorate=record.electorate)
        if not has_quorum(ready, record.electorate):
            return replace(state, resumed=False), []  # those whom that roster names are waited for
    elif record.reconfiguration < state.reconfiguration:
        return state, []  # it can no more be certified: a later roster was needed to get here
    resumed = Round(
        record.plan,
        opened=now,
        deadline=now,
        closed=now,
        commitments=last.commitments,
        contributions=last.contributions,
        reduction=Reduction(record.reducer_order) if record.plan.is_sharded else None,
    )
    state = replace(state, phase=Phase.CERTIFYING, maybe_certified=record.hash)
    return open_ballot(rules, state, resumed, record, now)


def vote_on_sealed_record(rules: Rules, state: State, sealed: bytes, now: float) -> Step:
    """Put a record to the vote that a coordinator has sealed under another leader, if a member told of it."""
    for promise in state.promises.values():
        if promise.accepted is not None and promise.accepted.hash == sealed:
            under = replace(
                state, reconfiguration=promise.accepted.reconfiguration, electorate=promise.accepted.electorate
            )
            return _vote_again(rules, under, promise, promise.accepted, promise.accepted.electorate, now)
    return state, []


def _go_on(rules: Rules, state: State, plan: Plan, promises: Sequence[Promised], now: float) -> Step:
    """``plan`` as it stands; its deadlines begin anew, for nobody knows when it was begun."""
    commitments: dict[str, tuple[bytes, bytes]] = {}
    for promise in promises:
        if promise.plan == plan:
            commitments = {**promise.commitments, **commitments}
    while state.term <= plan.term:  # a plan has a later term than the last vote, which is all that a leader hears of
        state = replace(state, term=state.term + rules.coordinators)
    deadline = now + training_allowance(rules, state)
    awaited = frozenset(member.node for member in plan.members) - set(state.peers)
    resumed = Round(plan, opened=now, deadline=deadline, term=state.term, awaited=awaited, commitments=commitments)
    if commitments:
        resumed = close_commitments(rules, state, resumed, now)
    phase = Phase.CERTIFYING if commitments else Phase.TRAINING
    return replace(state, phase=phase, round=resumed, note=""), [Planned(plan)]


def _follows(rules: Rules, state: State, plan: Plan, ready: Sequence[str]) -> bool:
    """Whether a plan is one for the round to come, with somebody here to carry it out."""
    return (
        (plan.round, plan.previous, plan.base_root) == (state.rounds + 1, state.head, state.state_root)
        and plan.position == state.position
        and plan.seed == round_seed(state.head)
        and plan.term < state.term + PLANNED_SINCE * rules.coordinators
        and quota_fault(plan, rules) is None
        and plan.reducers == (rules.reducers_for(len(plan.members)) if plan.is_sharded else 0)
        and any(plan.member(node) is not None for node in ready)
    )
