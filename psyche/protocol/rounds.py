"""The rounds of a run as a pure state machine: ``tick(rules, state, event, now) -> (state, effects)``.

    WAITING -> TRAINING -> COMMITTING -> CERTIFYING -> WAITING ...      PAUSED, FINISHED

    stages of a round: COMMITTING -> REVEALING -> [REDUCING] -> VOTING -> ATTESTING     (README.md)

An event is applied (``admission.py``), then the state advances as far as it can (``_advance``). Time is an argument;
nothing here reads a clock, so every rule can be tested by replaying events.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from psyche.protocol.admission import Step, after_record, apply_event, without_peer
from psyche.protocol.messages import Plan, Record
from psyche.protocol.pacing import exchange_allowance, observed, planned, training_allowance
from psyche.protocol.proposals import (
    abandon,
    close_commitments,
    common_payloads,
    draw_seats,
    electorate_weights,
    members_in_training,
    nodes_reporting,
    present_members,
    propose,
    reconfiguration_electorate,
    round_seed,
    short_names,
    voting_weights,
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
from psyche.protocol.standing import (
    Weights,
    at_least_half,
    founding_weights,
    has_quorum,
    keeps_half,
    quorum,
    restricted,
    total,
)
from psyche.protocol.takeover import (
    agree_on_state,
    may_go_on_without,
    ready_members,
    resume_round,
    vote_on_sealed_record,
    with_note,
)

GRACE = 0.1
"""Share of a round's training time that a stage waits for nodes without voting weight, and for a member that was too
slow in the exchange. Without it the next round loses their work; this is what waiting may cost all. Keys are free, so
however many strangers there are, they delay a stage by no more than this."""


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
    if not state.electorate or not has_quorum(ready, electorate_weights(state)):
        missing = set(state.electorate) - set(ready) - state.left_voters
        if missing and not may_go_on_without(rules, state, ready, now):
            return with_note(state, Phase.PAUSED, f"waiting for votes of {short_names(missing)}")
        electorate = reconfiguration_electorate(state, draw_seats(state, ready))
        if not electorate:
            return with_note(state, Phase.PAUSED, "waiting for a node with voting weight: all have left")
        state = with_electorate(state, electorate)
    if not state.resumed:
        return resume_round(rules, state, ready, now)
    seats = members_in_training(rules, state, draw_seats(state, ready))
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
        members=planned(rules, state, seats, voting_weights(state) or founding_weights(seats)),
    )
    opened = Round(plan, opened=now, deadline=now + training_allowance(rules, state), term=plan.term)
    return replace(state, phase=Phase.TRAINING, term=plan.term, round=opened, note=""), [Planned(plan)]


def _collect_commitments(rules: Rules, state: State, current: Round, now: float) -> Step:
    weights = current.plan.weights
    missing = {node for node in present_members(state, current) if node not in current.commitments}
    if now - current.opened < rules.silence:  # a quorum has found the new leader; the others are about to
        missing |= current.awaited - set(state.peers) - state.left_voters
    voters_missing = missing & weights.keys()
    waits = voters_missing or not current.commitments or now < _strangers_deadline(current)
    if missing and waits and now < current.deadline:
        if state.phase is Phase.TRAINING and current.commitments:
            return replace(state, phase=Phase.COMMITTING), []
        return state, []
    if missing and not current.commitments and now < current.opened + rules.round_bounds[1]:
        # Nobody has finished yet. Planning the round again would throw away the work of all members.
        later = min(now + (now - current.opened), current.opened + rules.round_bounds[1])
        note = f"round {current.plan.round} takes longer than the previous ones; no member has finished yet"
        return replace(state, note=note, round=replace(current, deadline=later)), []
    # Voters that missed the deadline took at least this long; without them deadlines could only shrink.
    late = (now - current.opened for _ in voters_missing)
    state = replace(state, commit_seconds=observed(state.commit_seconds, *late))
    if not current.commitments:
        return abandon(state, current, "no member committed before the deadline")
    revealing = close_commitments(rules, state, current, now)
    return replace(state, phase=Phase.CERTIFYING, round=revealing), []


def _strangers_deadline(current: Round) -> float:
    """Return until when the round waits for members without weight once all voters that are here have committed."""
    weights = current.plan.weights
    last = max((at for node, at in current.committed_at.items() if node in weights), default=current.opened)
    return last + GRACE * (last - current.opened)


def _collect_contributions(rules: Rules, state: State, current: Round, now: float) -> Step:
    here = present_members(state, current)
    opened = frozenset(current.contributions)
    unopened = {node for node in here if node in current.commitments and node not in opened}
    lacking = {node for node in here if not opened <= current.holdings.get(node, frozenset())}
    if _is_waiting(current, unopened | lacking, current.plan.weights, current.closed, now):
        return state, []
    # All members must be able to vote for the record, so it holds what they have in common.
    accepted, holders = common_payloads(current, opened, here, quorum)
    if not accepted:
        accepted, holders = common_payloads(current, opened, here, at_least_half)
    if not accepted:
        return abandon(state, current, "no payload reached half of the members before the deadline")
    done = (
        current.held_at[node] if accepted <= current.holdings.get(node, frozenset()) else now
        for node in restricted(current.plan.weights, here)
    )
    seconds = observed(state.exchange_seconds, *(at - current.closed for at in done))
    state = replace(state, exchange_seconds=seconds)
    if current.reduction is not None:
        failed = set(current.reduction.reducer_order) - set(holders)
        return select(rules, state, current, current.reduction, accepted, failed, now)
    return propose(rules, state, current, accepted, None, now)


def _is_waiting(current: Round, missing: Collection[str], weights: Weights, since: float, now: float) -> bool:
    """Return whether a stage that began at ``since`` waits for the nodes ``missing``: voters until the deadline, others
    for the grace period."""
    if not missing or now >= current.deadline:
        return False
    return not weights.keys().isdisjoint(missing) or now < since + GRACE * (current.closed - current.opened)


def _collect_votes(rules: Rules, state: State, current: Round, now: float) -> Step:
    assert current.ballot is not None
    record, votes = current.ballot.record, current.ballot.votes
    if has_quorum(votes, record.weights):
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
    electorate = reconfiguration_electorate(state, holders)
    if not keeps_half(electorate, restricted(electorate_weights(state), here)):
        # Voters that are here are left out only by half of the weight here; who has died is known after silence.
        if now - current.ballot.since <= rules.silence:
            return replace(state, round=replace(current, deadline=now + rules.silence)), []
        if current.ballots > 1:
            return abandon(state, current, "voters with half of the weight did not vote in time")
        electorate = reconfiguration_electorate(state, here)
    return propose(rules, state, current, accepted, electorate, now)


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
    weights = {node: weight for node, weight in record.weights.items() if node not in gone}
    waiting = {n for n, p in state.peers.items() if p.state_root == base and n not in {*current.attestations, *gone}}
    if _is_waiting(current, waiting, {n: w for n, w in weights.items() if n not in late}, current.certified_at, now):
        return state, []
    # The state after a round is computed, not chosen: where less than half of the weight lies, a root that more than
    # half of it attests is right. Where so many voters have gone since the vote that no half is left, those that are
    # here must all attest the same root.
    support = {
        root: total(weights, nodes_reporting(current.attestations, root)) for root in set(current.attestations.values())
    }
    agreed = [root for root, weight in support.items() if 2 * weight > total(weights)]
    silent = set(weights) & set(state.peers) - set(current.attestations)
    if not agreed and not silent and len(unanimous := [root for root, weight in support.items() if weight]) == 1:
        agreed = unanimous
    if not agreed:
        note = f"no root is attested by half of the voting weight after round {current.plan.round}" + (
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
