"""The rounds of a run as a pure state machine: ``tick(rules, state, event, now) -> (state, effects)``.

    WAITING -> TRAINING -> COMMITTING -> CERTIFYING -> WAITING ...      PAUSED, FINISHED

    stages of a round: COMMITTING -> REVEALING -> [REDUCING] -> VOTING -> ATTESTING     (README.md)

An event is applied (``admission.py``), then the state advances as far as it can (``_advance``). Time is an argument;
nothing here reads a clock, so every rule can be tested by replaying events.
"""

from __future__ import annotations

from dataclasses import replace

from psyche.protocol.admission import Step, after_record, apply_event, without_peer
from psyche.protocol.messages import Plan, Record
from psyche.protocol.pacing import exchange_allowance, observed, planned, training_allowance
from psyche.protocol.proposals import (
    abandon,
    at_least_half,
    close_commitments,
    common_payloads,
    draw_seats,
    eligible_voters,
    has_quorum,
    members_in_training,
    nodes_reporting,
    present_members,
    propose,
    quorum,
    reconfiguration_electorate,
    round_seed,
    short_names,
    with_electorate,
)
from psyche.protocol.reduction import collect_results, reduce_anew, select, vote_anew
from psyche.protocol.round_state import (
    Certified,
    CosignersUnreachable,
    Departed,
    Diverged,
    Effect,
    Event,
    Finished,
    Phase,
    Planned,
    Round,
    Rules,
    SignatureConflict,
    Stage,
    State,
    StateAgreed,
)
from psyche.protocol.takeover import (
    agree_on_state,
    is_overdue,
    ready_members,
    resume_round,
    vote_on_sealed_record,
    with_note,
)

GRACE = 0.1
"""Share of the round's training time that the others wait for a member that was too slow in the exchange. Without it
the next round loses that member's work; this is what waiting may cost all."""


def tick(rules: Rules, state: State, event: Event, now: float) -> Step:
    """Apply one event at time ``now`` (seconds, any monotonic origin) and advance as far as possible."""
    if isinstance(event, SignatureConflict):
        state, effects = _overrule(rules, state, event, now)
    elif isinstance(event, CosignersUnreachable):
        state, effects = _fall_back(rules, state, event, now)
    else:
        state, effects = apply_event(rules, state, event, now)
    while True:
        after, more = _advance(rules, state, now)
        effects += more
        if after is state:
            return state, effects
        state = after


# ----------------------------------------------------------------------------------- transitions


def _advance(rules: Rules, state: State, now: float) -> Step:
    """Make one transition if one is due; return the same state object if none is."""
    for node, peer in state.peers.items():
        if now - peer.seen > rules.silence:
            gone = f"not heard from for {rules.silence:g} s"
            return without_peer(state, node), [Departed(node, gone)]
    current = state.round
    if state.phase is Phase.FINISHED:
        return state, []
    if current is None:
        return _open_or_wait(rules, state, now)
    match current.stage:
        case Stage.COMMITTING:
            return _collect_commitments(rules, state, current, now)
        case Stage.REVEALING:
            return _collect_contributions(rules, state, current, now)
        case Stage.REDUCING:
            return collect_results(rules, state, current, now)
        case Stage.VOTING:
            return _collect_votes(rules, state, current, now)
        case Stage.ATTESTING:
            return _collect_attestations(rules, state, current, now)


def _open_or_wait(rules: Rules, state: State, now: float) -> Step:
    if state.rounds >= rules.rounds:
        return replace(state, phase=Phase.FINISHED, note=f"all {rules.rounds} rounds are done"), [
            Finished(state.rounds)
        ]
    if not state.state_root:
        return agree_on_state(rules, state, now)
    ready = ready_members(state)
    needed = rules.min_members if state.rounds else rules.start_members
    if len(ready) < needed:
        phase = Phase.PAUSED if state.rounds else Phase.WAITING
        syncing = len(state.peers) - len(ready)
        note = f"waiting for members: {len(ready)} of {needed} are ready" + (
            f", {syncing} synchronising" * bool(syncing)
        )
        return with_note(state, phase, note)
    if not has_quorum(ready, state.electorate):
        missing = set(state.electorate) - set(ready) - state.left_voters
        if missing and not is_overdue(rules, state, now):
            return with_note(state, Phase.PAUSED, f"waiting for votes of {short_names(missing)}")
        state = with_electorate(state, reconfiguration_electorate(rules, state, draw_seats(rules, state, ready)))
    if not state.resumed:
        return resume_round(rules, state, ready, now)
    seats = members_in_training(rules, state, draw_seats(rules, state, ready))
    voters = set(eligible_voters(rules, state, seats))
    reducers = 0 if state.force_gather else rules.reducers_for(len(seats))
    plan = Plan(
        round=state.rounds + 1,
        term=state.term + rules.coordinators,
        previous=state.head,
        base_root=state.state_root,
        seed=round_seed(state.head),
        position=state.position,
        exchange="sharded" if reducers else "gather",
        reducers=reducers,
        members=planned(rules, state, seats, voters),
    )
    opened = Round(plan, opened=now, deadline=now + training_allowance(rules, state), term=plan.term)
    return replace(state, phase=Phase.TRAINING, term=plan.term, round=opened, note=""), [Planned(plan)]


def _collect_commitments(rules: Rules, state: State, current: Round, now: float) -> Step:
    missing = {node for node in present_members(state, current) if node not in current.commitments}
    if now - current.opened < rules.silence:  # a quorum has found the new leader; the others are about to
        missing |= current.awaited - set(state.peers) - state.left_voters
    if missing and now < current.deadline:
        if state.phase is Phase.TRAINING and current.commitments:
            return replace(state, phase=Phase.COMMITTING), []
        return state, []
    if missing and not current.commitments and now < current.opened + rules.round_bounds[1]:
        # Nobody has finished yet. Planning the round again would throw away the work of all members.
        later = min(now + (now - current.opened), current.opened + rules.round_bounds[1])
        note = f"round {current.plan.round} takes longer than the previous ones; no member has finished yet"
        return replace(state, note=note, round=replace(current, deadline=later)), []
    # Members that missed the deadline took at least this long; without them deadlines could only shrink.
    late = (now - current.opened for _ in missing)
    state = replace(state, commit_seconds=observed(state.commit_seconds, *late))
    if not current.commitments:
        return abandon(state, current, "no member committed before the deadline")
    revealing = close_commitments(rules, state, current, now)
    return replace(state, phase=Phase.CERTIFYING, round=revealing), []


def _collect_contributions(rules: Rules, state: State, current: Round, now: float) -> Step:
    here = present_members(state, current)
    opened = frozenset(current.contributions)
    unopened = [node for node in here if node in current.commitments and node not in opened]
    lacking = [node for node in here if not opened <= current.holdings.get(node, frozenset())]
    if (unopened or lacking) and now < current.deadline:
        return state, []
    # All members must be able to vote for the record, so it holds what they have in common.
    accepted, holders = common_payloads(current, opened, here, quorum)
    if not accepted:
        accepted, holders = common_payloads(current, opened, here, at_least_half)
    if not accepted:
        return abandon(state, current, "no payload reached half of the members before the deadline")
    done = (current.held_at[node] if accepted <= current.holdings.get(node, frozenset()) else now for node in here)
    seconds = observed(state.exchange_seconds, *(at - current.closed for at in done))
    state = replace(state, exchange_seconds=seconds)
    if current.reduction is not None:
        failed = set(current.reduction.reducer_order) - set(holders)
        return select(rules, state, current, current.reduction, accepted, failed, now)
    return propose(rules, state, current, accepted, None, now)


def _collect_votes(rules: Rules, state: State, current: Round, now: float) -> Step:
    assert current.ballot is not None
    record, votes = current.ballot.record, current.ballot.votes
    if has_quorum(votes, record.electorate):
        deadline = now + exchange_allowance(rules, state.exchange_seconds)
        certified = replace(current, stage=Stage.ATTESTING, certified_at=now, deadline=deadline)
        seconds = now - current.opened
        return replace(state, round=certified), [Certified(record, tuple(votes[n] for n in sorted(votes)), seconds)]
    if record.results and (step := reduce_anew(rules, state, current, record.results, now)):
        return step
    if now < current.deadline:
        return state, []
    here = present_members(state, current)
    if not here:
        note = f"round {current.plan.round} waits for votes of {short_names(set(record.electorate) - set(votes))}"
        return with_note(state, state.phase, note)
    if record.results:
        return vote_anew(rules, state, current, current.ballot, now)
    # A member that was asked for a vote and gave none is not waited for twice, whatever it claims to have, nor does it
    # influence what the others vote on. Where nobody voted, all are asked once more.
    asked = [node for node in here if node in votes or node not in record.electorate]
    if not asked and current.ballots == 1:
        asked = here
    accepted, holders = common_payloads(current, frozenset(one.node for one in record.accepted), asked, at_least_half)
    if not accepted:
        return abandon(state, current, "nobody voted" if not asked else "the voters hold no payload in common")
    return propose(rules, state, current, accepted, reconfiguration_electorate(rules, state, holders), now)


def _overrule(rules: Rules, state: State, event: SignatureConflict, now: float) -> Step:
    """Open a ballot on the same record under a reconfiguration that conflicts with nothing, or on the sealed record."""
    current = state.round
    if current is None or current.proposal is None or current.proposal.hash != event.record:
        return state, []
    if event.sealed:
        return vote_on_sealed_record(rules, state, event.sealed, now)
    record = current.proposal
    state = replace(
        state, reconfiguration=max(state.reconfiguration, event.reconfiguration), maybe_certified=record.hash
    )
    uncertified = replace(current, attestations={})
    accepted = frozenset(one.node for one in record.accepted)
    return propose(rules, state, uncertified, accepted, None, now, record.results, record.dissenters)


def _fall_back(rules: Rules, state: State, event: CosignersUnreachable, now: float) -> Step:
    """Open a ballot on the same record under the electorate that was to be replaced: its members may only be slow.

    The leader has published nothing under the new electorate, so no votes of it exist.
    """
    current = state.round
    if current is None or current.proposal is None or current.proposal.hash != event.record:
        return state, []
    if current.certified or state.replaced is None:
        return state, []
    record, (electorate, reconfiguration) = current.proposal, state.replaced
    accepted = frozenset(one.node for one in record.accepted)
    state = replace(state, electorate=electorate, reconfiguration=reconfiguration, replaced=None)
    return propose(rules, state, current, accepted, None, now, record.results, record.dissenters)


def _left_behind(current: Round, record: Record) -> set[str]:
    """Return the members that lacked payloads of the record when the exchange's deadline passed: all waited for them.

    Newcomers outside the plan are not among them; they could not fetch before the record was known.
    """
    if record.results:
        return set()
    accepted = {one.node for one in record.accepted}
    return {m.node for m in current.plan.members if not accepted <= current.holdings.get(m.node, frozenset())}


def _collect_attestations(rules: Rules, state: State, current: Round, now: float) -> Step:
    record = current.proposal
    assert record is not None
    base, late, gone = current.plan.base_root, _left_behind(current, record), set(record.audit_state.banned)
    waiting = [n for n, p in state.peers.items() if p.state_root == base and n not in {*current.attestations, *gone}]
    until = current.deadline
    if set(waiting) <= late:
        until = min(until, current.certified_at + GRACE * (current.closed - current.opened))
    if waiting and now < until:
        return state, []
    # The state after a round is computed, not chosen: where fewer than half of the members lie, a root that more than
    # half of them report is right. Attesting members count whether they are in the electorate or not, so that a small
    # electorate is no shortcut; nodes that only followed the round do not. Where so many members have gone since the
    # vote that no half is left, those that are here must all report the same root.
    votes = {member.node: member.votes for member in current.plan.members} | dict.fromkeys(record.electorate, 1)
    reconfiguration_electorate = {member.node for member in current.plan.members} & set(record.electorate) - gone
    total = sum(votes.get(node, 0) for node in reconfiguration_electorate | set(current.attestations))
    weights = {
        root: sum(votes.get(node, 0) for node in nodes_reporting(current.attestations, root))
        for root in set(current.attestations.values())
    }
    agreed = [root for root, weight in weights.items() if 2 * weight > total]
    silent = reconfiguration_electorate & set(state.peers) - set(current.attestations)
    if not agreed and not silent and len(unanimous := [root for root, weight in weights.items() if weight]) == 1:
        agreed = unanimous
    if not agreed:
        note = f"no half of the members agrees on the state after round {current.plan.round}" + (
            f"; waiting for {short_names(silent)}" if silent else ""
        )
        return with_note(state, Phase.PAUSED, note)
    root = agreed[0]
    effects: list[Effect] = [StateAgreed(current.plan.round, root)]
    for node, other in sorted(current.attestations.items()):
        if other != root:
            effects.append(Diverged(node, current.plan.round, root, other))
    settled = after_record(rules, replace(state, phase=Phase.WAITING, note=""), record, root)
    return settled, effects
