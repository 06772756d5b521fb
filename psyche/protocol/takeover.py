"""How a new leader resumes the round of the leader before it: phase 1 of Paxos (Lamport, *Paxos Made Simple*, §2.2).

The new leader knows only what members tell it. It leads once more than two thirds of the electorate have promised to
take part in nothing of an earlier term. A record that one of them voted for may have been certified, so a ballot is
opened on it again; a round in progress goes on, with the commitments that were published.

A leader's later proposals need no new promises: only the leader makes certificates of its proposals, and it makes none
of a proposal that it has replaced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

from psyche.protocol.admission import Step
from psyche.protocol.messages import Plan, Record
from psyche.protocol.pacing import quota_fault, training_allowance
from psyche.protocol.proposals import (
    close_commitments,
    electorate_weights,
    nodes_reporting,
    open_ballot,
    round_seed,
    short_names,
)
from psyche.protocol.round_state import Phase, Planned, Promised, Reduction, Round, Rules, State
from psyche.protocol.standing import has_quorum, keeps_half, restricted, total

PLANNED_SINCE = 16
"""The most plans that the previous leader is assumed to have made since the last vote. A plan carries no signature, so
without a bound a member could drive terms up."""


def ready_members(state: State) -> list[str]:
    """Return the nodes that are here, hold the run's state and follow this leader."""
    return sorted(
        node for node, peer in state.peers.items() if peer.state_root == state.state_root and node in state.promises
    )


def with_note(state: State, phase: Phase, note: str) -> Step:
    """Return the state with a note of what the run waits for."""
    return (state, []) if (state.phase, state.note) == (phase, note) else (replace(state, phase=phase, note=note), [])


MINORITY_SILENCES = 20
"""Times ``silence`` after which voters with less than half of the weight continue without the rest: 5 minutes
by default. A volunteer's machine restarts in less, and whoever is left alone with a run decides everything in it."""


def may_go_on_without(rules: Rules, state: State, here: Collection[str], now: float) -> bool:
    """Return whether voters other than ``here`` have had time to come back."""
    weights = electorate_weights(state)
    if state.last_arrival is None or not total(weights, here):
        return False
    patience = rules.silence * (1 if keeps_half(here, weights) else MINORITY_SILENCES)
    return now - state.last_arrival > patience


def agree_on_state(rules: Rules, state: State, now: float) -> Step:
    """Take the state that more than two thirds of the electorate hold; of the voters that are here if others stay away.

    Only voters that have applied the last record count, by their weight; strangers never do. A minority is believed
    only after :data:`MINORITY_SILENCES`.
    """
    weights = electorate_weights(state)
    voters = {
        node: peer.state_root for node, peer in state.peers.items() if peer.rounds == state.rounds and node in weights
    }
    here = restricted(weights, voters)
    for root in sorted(set(voters.values())):
        holders = nodes_reporting(voters, root)
        if has_quorum(holders, weights) or (may_go_on_without(rules, state, here, now) and has_quorum(holders, here)):
            return replace(state, state_root=root), []
    missing = set(state.electorate) - set(voters)
    behind = missing & set(state.peers)
    note = f"restarted after round {state.rounds}; waiting for members of that round: {short_names(missing or voters)}"
    if behind:
        note += f"; its state is not known to {short_names(behind)}, who are behind"
    return with_note(state, Phase.PAUSED, note)


def resume_round(rules: Rules, state: State, ready: Sequence[str], now: float) -> Step:
    """Resume the next round from where the members had got with it under another leader."""
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
    """Open a ballot on ``record``: more than two thirds may have voted for it already, which nobody here can know."""
    if record.reconfiguration > state.reconfiguration:
        state = replace(state, reconfiguration=record.reconfiguration, electorate=record.electorate)
        if not has_quorum(ready, record.weights):
            return replace(state, resumed=False), []  # those whom that reconfiguration names are waited for
    elif record.reconfiguration < state.reconfiguration:
        return state, []  # it can no more be certified: a later reconfiguration was needed to get here
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
    """Open a ballot on the record that a coordinator sealed under another leader, if a promise contains it."""
    for promise in state.promises.values():
        if promise.accepted is not None and promise.accepted.hash == sealed:
            under = replace(
                state, reconfiguration=promise.accepted.reconfiguration, electorate=promise.accepted.electorate
            )
            return _vote_again(rules, under, promise, promise.accepted, promise.accepted.electorate, now)
    return state, []


def _go_on(rules: Rules, state: State, plan: Plan, promises: Sequence[Promised], now: float) -> Step:
    """Go on with ``plan``. Its deadlines begin anew, because nobody knows when it was begun."""
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
    """Return whether ``plan`` is valid for the next round, and one of its members is here."""
    return (
        (plan.round, plan.previous, plan.base_root) == (state.rounds + 1, state.head, state.state_root)
        and plan.position == state.position
        and plan.seed == round_seed(state.head)
        and plan.term < state.term + PLANNED_SINCE * rules.coordinators
        and quota_fault(plan, rules) is None
        and plan.reducers == (rules.reducers_for(len(plan.members)) if plan.is_sharded else 0)
        and any(plan.member(node) is not None for node in ready)
    )
