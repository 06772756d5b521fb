"""The rounds of a run as a pure state machine: ``tick(rules, state, event, now) -> (state, effects)``.

    WAITING -> TRAINING -> COMMITTING -> CERTIFYING -> WAITING ...      PAUSED, FINISHED     (DESIGN §6)

An event is absorbed (``_absorb``), then the state moves on as far as it can (``_advance``). Time is an
argument; nothing here reads a clock, so every rule can be tested by replaying events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from psyche.numerics.digest import digest
from psyche.protocol.assignment import next_position
from psyche.protocol.deadlines import WINDOW, adaptive
from psyche.protocol.messages import MAX_MEMBERS, Accepted, Contribution, Excluded, Member, Plan, Record
from psyche.protocol.state import (
    Abandoned,
    Arrived,
    Attested,
    Certified,
    Committed,
    Departed,
    Diverged,
    Effect,
    Event,
    Finished,
    Held,
    Left,
    Opened,
    Peer,
    Phase,
    Planned,
    Proposed,
    Rejected,
    Restored,
    Round,
    Rules,
    Seen,
    Settled,
    State,
    Tick,
    Voted,
)

Step = tuple[State, list[Effect]]
V = TypeVar("V")


def tick(rules: Rules, state: State, event: Event, now: float) -> Step:
    """Absorb one event at time ``now`` (seconds, any monotonic origin) and advance as far as possible."""
    state, effects = _absorb(rules, state, event, now)
    while True:
        after, more = _advance(rules, state, now)
        effects += more
        if after is state:
            return state, effects
        state = after


def quorum(yes: int, total: int) -> bool:
    """More than two thirds of the voting weight."""
    return 3 * yes > 2 * total


def round_seed(previous: bytes) -> bytes:
    """The seed of a round follows from the record before it, not from a clock or a proposer's choice."""
    return digest("seed", previous)


# --------------------------------------------------------------------------------------- events


def _absorb(rules: Rules, state: State, event: Event, now: float) -> Step:
    match event:
        case Tick():
            return state, []
        case Seen(node):
            peer = state.peers.get(node)
            return (state, []) if peer is None else (_with_peer(state, node, replace(peer, seen=now)), [])
        case Arrived(node, state_root, device):
            return _with_peer(state, node, Peer(now, state_root, device[:64])), []
        case Left(node, reason):
            return _without_peer(state, node), [Departed(node, reason)] if node in state.peers else []
        case Restored(record):
            return _restore(rules, state, record)
        case _:
            refusal = _refusal(rules, state, event)
            if refusal:
                return state, [Rejected(event.node, refusal)]
            return _accept(state, event, now), []


def _refusal(rules: Rules, state: State, event: Committed | Opened | Held | Voted | Attested) -> str | None:
    """Why a member's message about a round is not taken, or None."""
    current = state.round
    if current is None or current.plan.round != event.round:
        return f"round {event.round} is not open; the run has certified {state.rounds} rounds"
    # Who only follows a round may attest, too: that is how a newcomer gets into the next one.
    if current.plan.member(event.node) is None and not (isinstance(event, Attested) and event.node in state.peers):
        return f"not a member of round {event.round}"
    if isinstance(event, Committed):
        if current.closed is not None:
            return f"round {event.round} no longer takes commitments: its deadline has passed"
        if current.commitments.get(event.node, (event.digest,))[0] != event.digest:
            return "a different commitment was already made in this round"
        return None
    if current.closed is None:
        return f"round {event.round} still takes commitments"
    match event:
        case Opened():
            return _bad_opening(rules, current, event)
        case Attested() if not current.certified:
            return f"round {event.round} is not certified yet"
        case Voted():
            if current.proposal is None or event.term != current.term:
                return f"no proposal of term {event.term} is open"
            if event.record != current.proposal.hash:
                return "the vote names another record than was proposed"
            if event.node not in current.proposal.electorate:
                return "not in the electorate"
    return None


def _bad_opening(rules: Rules, current: Round, event: Opened) -> str | None:
    given, plan = event.contribution, current.plan
    member = plan.member(event.node)
    assert member is not None
    committed = current.commitments.get(event.node)
    if committed is None:
        return "nothing was committed before the deadline"
    if given.commitment(event.node, rules.run_id, plan.round) != committed[0]:
        return "the contribution is not the one committed to"
    return contribution_fault(rules, plan, member, given)


def contribution_fault(rules: Rules, plan: Plan, member: Member, given: Contribution) -> str | None:
    """What is wrong with a contribution by the plan alone, or None. Nobody sets their own weight."""
    if given.base_root != plan.base_root:
        return "trained from another base state"
    if given.inner_steps > member.inner_steps:
        return f"{given.inner_steps} inner steps claimed where {member.inner_steps} were due"
    if given.tokens != given.inner_steps * rules.tokens_per_step:
        return "the tokens claimed are not those of the inner steps claimed"
    if len(given.slices) != len(rules.slice_bytes):
        return f"{len(given.slices)} slices where {len(rules.slice_bytes)} were due"
    if any(one.size > most for one, most in zip(given.slices, rules.slice_bytes, strict=True)):
        return "a slice is larger than the codec can make it"
    return None


def _accept(state: State, event: Committed | Opened | Held | Voted | Attested, now: float) -> State:
    current = state.round
    assert current is not None
    node = event.node
    match event:
        case Committed():
            if node not in current.commitments:
                state = replace(state, commit_seconds=_observed(state.commit_seconds, now - current.opened))
            current = replace(current, commitments=_put(current.commitments, node, (event.digest, event.proof)))
        case Opened():
            current = replace(
                current, contributions=_put(current.contributions, node, (event.contribution, event.proof))
            )
        case Held():
            held = event.nodes & {member.node for member in current.plan.members}
            if held != current.holdings.get(node):
                current = replace(
                    current,
                    holdings=_put(current.holdings, node, held),
                    held_at=_put(current.held_at, node, now),
                )
        case Voted():
            current = replace(current, votes=_put(current.votes, node, event.proof))
        case Attested():
            current = replace(current, attestations=_put(current.attestations, node, event.state_root))
            if node in state.peers:
                state = _with_peer(state, node, replace(state.peers[node], state_root=event.state_root))
    return replace(state, round=current)


def _restore(rules: Rules, state: State, record: Record) -> Step:
    """Take over a certified history longer than ours.

    It can only be ours, from before a restart: a round that was opened meanwhile in ignorance of it is dropped. What
    this coordinator has certified itself stands.
    """
    if record.plan.round <= state.rounds:
        return state, []
    effects: list[Effect] = []
    if (current := state.round) is not None:
        if current.certified or record.plan.round < current.plan.round:
            return state, []
        effects.append(Abandoned(current.plan.round, f"round {record.plan.round} was certified before a restart"))
    restored = replace(
        state,
        phase=Phase.PAUSED,
        rounds=record.plan.round,
        head=record.hash,
        state_root=b"",
        position=next_position(record.plan, rules.batch_size),
        term=max(state.term, record.plan.term),
        electorate=record.electorate,
        round=None,
    )
    return restored, effects


# ----------------------------------------------------------------------------------- transitions


def _advance(rules: Rules, state: State, now: float) -> Step:
    """One transition, if one is due; the same state object if none is."""
    for node, peer in state.peers.items():
        if now - peer.seen > rules.silence:
            gone = f"not heard from for {rules.silence:g} s"
            return _without_peer(state, node), [Departed(node, gone)]
    current = state.round
    if state.phase is Phase.FINISHED:
        return state, []
    if current is None:
        return _open_or_wait(rules, state, now)
    if current.closed is None:
        return _collect_commitments(rules, state, current, now)
    if current.proposal is None:
        return _collect_contributions(rules, state, current, now)
    if not current.certified:
        return _collect_votes(rules, state, current, now)
    return _collect_attestations(rules, state, current, now)


def _open_or_wait(rules: Rules, state: State, now: float) -> Step:
    if state.rounds >= rules.rounds:
        return replace(state, phase=Phase.FINISHED, note=f"all {rules.rounds} rounds are done"), [
            Finished(state.rounds)
        ]
    if not state.state_root:
        return _agree_on_restart(state)
    ready = sorted(node for node, peer in state.peers.items() if peer.state_root == state.state_root)
    needed = rules.min_members if state.rounds else rules.start_members
    if len(ready) < needed:
        phase = Phase.PAUSED if state.rounds else Phase.WAITING
        syncing = len(state.peers) - len(ready)
        note = f"waiting for members: {len(ready)} of {needed} are ready" + (
            f", {syncing} synchronising" * bool(syncing)
        )
        return (
            (state, []) if (state.phase, state.note) == (phase, note) else (replace(state, phase=phase, note=note), [])
        )
    plan = Plan(
        round=state.rounds + 1,
        term=state.term + 1,
        previous=state.head,
        base_root=state.state_root,
        seed=round_seed(state.head),
        position=state.position,
        members=tuple(Member(node, rules.inner_steps, 1) for node in _seated(ready, round_seed(state.head))),
    )
    least, most = rules.round_bounds
    allowed = adaptive(state.commit_seconds, spread=rules.spread, least=least, most=most)
    opened = Round(plan, opened=now, deadline=now + allowed, term=plan.term)
    return replace(state, phase=Phase.TRAINING, term=plan.term, round=opened, note=""), [Planned(plan)]


def _agree_on_restart(state: State) -> Step:
    """After a coordinator's restart: believe the state that more than two thirds of the last electorate hold."""
    back = {node: state.peers[node].state_root for node in state.electorate if node in state.peers}
    for root in sorted(set(back.values())):
        if quorum(len(_having(back, root)), len(state.electorate)):
            return replace(state, state_root=root), []
    missing = set(state.electorate) - set(back)
    note = f"restarted after round {state.rounds}; waiting for members of that round: {_names(missing or back)}"
    return (state, []) if state.note == note else (replace(state, phase=Phase.PAUSED, note=note), [])


def _collect_commitments(rules: Rules, state: State, current: Round, now: float) -> Step:
    missing = [node for node in _living(state, current) if node not in current.commitments]
    if missing and now < current.deadline:
        if state.phase is Phase.TRAINING and current.commitments:
            return replace(state, phase=Phase.COMMITTING), []
        return state, []
    # Who is here and did not make it took at least this long; without them a deadline could only ever shrink.
    late = (now - current.opened for _ in missing)
    state = replace(state, commit_seconds=_observed(state.commit_seconds, *late))
    if not current.commitments:
        return _abandon(state, current, "no member committed before the deadline")
    closed = replace(current, closed=now, deadline=now + _exchange_allowed(rules, state))
    return replace(state, phase=Phase.CERTIFYING, round=closed), []


def _collect_contributions(rules: Rules, state: State, current: Round, now: float) -> Step:
    living = _living(state, current)
    opened = frozenset(current.contributions)
    unopened = [node for node in living if node in current.commitments and node not in opened]
    lacking = [node for node in living if not opened <= current.holdings.get(node, frozenset())]
    if (unopened or lacking) and now < current.deadline:
        return state, []
    # All must be able to vote for the record, so it is about what they hold in common.
    accepted, _ = _held_in_common(current, opened, living, quorum)
    if not accepted:
        accepted, _ = _held_in_common(current, opened, living, _half)
    if not accepted:
        return _abandon(state, current, "no payload reached half of the members")
    assert current.closed is not None
    done = (current.held_at[node] if accepted <= current.holdings.get(node, frozenset()) else now for node in living)
    observed = _observed(state.exchange_seconds, *(at - current.closed for at in done))
    electorate = tuple(member.node for member in current.plan.members)
    return _propose(rules, replace(state, exchange_seconds=observed), current, accepted, electorate, now)


def _collect_votes(rules: Rules, state: State, current: Round, now: float) -> Step:
    record = current.proposal
    assert record is not None
    if carries_quorum(current.plan, current.votes, record.electorate):
        certified = replace(current, certified=True, deadline=now + _exchange_allowed(rules, state))
        seconds = now - current.opened
        effect = Certified(record, tuple(current.votes[node] for node in sorted(current.votes)), seconds)
        return replace(state, round=certified), [effect]
    if now < current.deadline:
        return state, []
    living = _living(state, current)
    if not living:
        note = f"round {current.plan.round} waits for votes of {_names(set(record.electorate) - set(current.votes))}"
        return (state, []) if state.note == note else (replace(state, note=note), [])
    # Who was asked for a vote and gave none is not waited for twice, whatever it says it holds; nor does it get to
    # say what the others vote on. Where nobody voted there is nobody to go on with, and all are asked once more.
    asked = [node for node in living if node in current.votes or node not in record.electorate]
    if not asked and current.term <= current.plan.term + 1:
        asked = living
    accepted, holders = _held_in_common(current, frozenset(a.node for a in record.accepted), asked, _half)
    if not accepted:
        return _abandon(state, current, "nobody voted" if not asked else "the voters hold no payload in common")
    return _propose(rules, state, current, accepted, tuple(holders), now)


def _collect_attestations(rules: Rules, state: State, current: Round, now: float) -> Step:
    record = current.proposal
    assert record is not None
    base = current.plan.base_root
    waiting = [n for n, peer in state.peers.items() if peer.state_root == base and n not in current.attestations]
    if waiting and now < current.deadline:
        return state, []
    # The state after a round is computed, not chosen: where fewer than half of the members lie, a root that more than
    # half of them found is the right one. Members that attest count, in the electorate or not, so that a small
    # electorate is no shortcut; who only followed the round does not.
    votes = {member.node: member.votes for member in current.plan.members}
    total = sum(votes[node] for node in votes if node in record.electorate or node in current.attestations)
    found = {root: _having(current.attestations, root) for root in set(current.attestations.values())}
    agreed = [root for root, nodes in found.items() if 2 * sum(votes.get(node, 0) for node in nodes) > total]
    if not agreed:
        silent = set(record.electorate) - set(current.attestations)
        note = f"no half of the members agrees on the state after round {current.plan.round}" + (
            f"; waiting for {_names(silent)}" if silent else ""
        )
        if (state.phase, state.note) == (Phase.PAUSED, note):
            return state, []
        return replace(state, phase=Phase.PAUSED, note=note), []
    root = agreed[0]
    effects: list[Effect] = [Settled(current.plan.round, root)]
    for node, other in sorted(current.attestations.items()):
        if other != root:
            effects.append(Diverged(node, current.plan.round, root, other))
    settled = replace(
        state,
        phase=Phase.WAITING,
        rounds=current.plan.round,
        head=record.hash,
        state_root=root,
        position=next_position(current.plan, rules.batch_size),
        electorate=record.electorate,
        round=None,
        note="",
    )
    return settled, effects


# -------------------------------------------------------------------------------------- helpers


def _propose(
    rules: Rules, state: State, current: Round, accepted: frozenset[str], electorate: tuple[str, ...], now: float
) -> Step:
    """Put a record to the vote, in a term of its own."""
    plan = current.plan
    excluded = tuple(
        Excluded(member.node, _exclusion(state, current, member.node))
        for member in plan.members
        if member.node not in accepted
    )
    record = Record(
        plan=plan,
        accepted=tuple(Accepted(node, current.contributions[node][0]) for node in sorted(accepted)),
        excluded=excluded,
        electorate=electorate,
        reconfiguration=len(electorate) < len(plan.members),
    )
    term = state.term + 1
    proposed = replace(current, term=term, proposal=record, votes={}, deadline=now + _exchange_allowed(rules, state))
    return replace(state, term=term, round=proposed, note=""), [Proposed(term, record)]


def _held_in_common(
    current: Round, candidates: frozenset[str], among: Sequence[str], enough: Callable[[int, int], bool]
) -> tuple[frozenset[str], list[str]]:
    """Contributions that ``enough`` of the members ``among`` hold every one of, and those members.

    The least held are given up first; without any that would do, both are empty.
    """
    votes = {member.node: member.votes for member in current.plan.members}
    total = sum(votes[node] for node in among)
    held = {node: current.holdings.get(node, frozenset()) for node in among}
    reach = {one: sum(votes[node] for node in among if one in held[node]) for one in candidates}
    for given_up in sorted(candidates, key=lambda one: (reach[one], one)):
        holders = [node for node in among if candidates <= held[node]]
        if enough(sum(votes[node] for node in holders), total):
            return candidates, holders
        candidates -= {given_up}
    return frozenset(), []


def _half(yes: int, total: int) -> bool:
    return total > 0 and 2 * yes >= total


def _seated(ready: Sequence[str], seed: bytes) -> list[str]:
    """As many of ``ready`` as a plan has room for, drawn by the round's seed, in ascending order."""
    if len(ready) <= MAX_MEMBERS:
        return list(ready)
    return sorted(sorted(ready, key=lambda node: digest("seat", seed, node.encode()))[:MAX_MEMBERS])


def _exclusion(state: State, current: Round, node: str) -> str:
    """The reason that stands in the record, and that the node can read."""
    gone = "" if node in state.peers else "; it was not heard from any more"
    if node not in current.commitments:
        return f"no commitment before the deadline{gone}"
    if node not in current.contributions:
        return f"the commitment was not opened{gone}"
    return f"its payload did not reach enough members{gone}"


def _abandon(state: State, current: Round, reason: str) -> Step:
    """The round ends without a record. Deadlines that could not be kept are forgotten, not set once more."""
    waiting = replace(state, phase=Phase.WAITING, round=None, note=reason, commit_seconds=(), exchange_seconds=())
    return waiting, [Abandoned(current.plan.round, reason)]


def _exchange_allowed(rules: Rules, state: State) -> float:
    least, most = rules.exchange_bounds
    return adaptive(state.exchange_seconds, spread=rules.spread, least=least, most=most)


def _living(state: State, current: Round) -> list[str]:
    """Members that are here and can still take part: one that came back without the base state cannot."""
    return [
        member.node
        for member in current.plan.members
        if (peer := state.peers.get(member.node)) is not None
        and (peer.state_root == current.plan.base_root or member.node in current.attestations)
    ]


def carries_quorum(plan: Plan, voters: Iterable[str], electorate: tuple[str, ...]) -> bool:
    """Whether ``voters`` carry more than two thirds of the electorate's voting weight."""
    votes = {member.node: member.votes for member in plan.members}
    return quorum(sum(votes[n] for n in set(voters) & set(electorate)), sum(votes[n] for n in electorate))


def _having(mapping: Mapping[str, bytes], value: bytes) -> list[str]:
    return [key for key, found in mapping.items() if found == value]


def _with_peer(state: State, node: str, peer: Peer) -> State:
    return replace(state, peers=_put(state.peers, node, peer))


def _without_peer(state: State, node: str) -> State:
    return replace(state, peers={key: peer for key, peer in state.peers.items() if key != node})


def _put(mapping: Mapping[str, V], key: str, value: V) -> dict[str, V]:
    return {**mapping, key: value}


def _observed(values: tuple[float, ...], *more: float) -> tuple[float, ...]:
    return (*values, *more)[-WINDOW:]


def _names(nodes: Iterable[str]) -> str:
    return ", ".join(node[-6:] for node in sorted(nodes))
