"""The rounds of a run as a pure state machine: ``tick(rules, state, event, now) -> (state, effects)``.

    WAITING -> TRAINING -> COMMITTING -> CERTIFYING -> WAITING ...      PAUSED, FINISHED     (DESIGN §6)

An event is absorbed (``admission.py``), then the state moves on as far as it can (``_advance``). Time is an
argument; nothing here reads a clock, so every rule can be tested by replaying events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from psyche.numerics.digest import digest
from psyche.protocol.admission import Step, absorb, observed, without_peer
from psyche.protocol.assignment import next_position
from psyche.protocol.deadlines import adaptive
from psyche.protocol.messages import MAX_MEMBERS, Accepted, Excluded, Member, Plan, Record
from psyche.protocol.state import (
    Abandoned,
    Certified,
    Departed,
    Diverged,
    Effect,
    Event,
    Finished,
    Phase,
    Planned,
    Proposed,
    Round,
    Rules,
    Settled,
    State,
)


def tick(rules: Rules, state: State, event: Event, now: float) -> Step:
    """Absorb one event at time ``now`` (seconds, any monotonic origin) and advance as far as possible."""
    state, effects = absorb(rules, state, event, now)
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


# ----------------------------------------------------------------------------------- transitions


def _advance(rules: Rules, state: State, now: float) -> Step:
    """One transition, if one is due; the same state object if none is."""
    for node, peer in state.peers.items():
        if now - peer.seen > rules.silence:
            gone = f"not heard from for {rules.silence:g} s"
            return without_peer(state, node), [Departed(node, gone)]
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
    state = replace(state, commit_seconds=observed(state.commit_seconds, *late))
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
    seconds = observed(state.exchange_seconds, *(at - current.closed for at in done))
    electorate = tuple(member.node for member in current.plan.members)
    return _propose(rules, replace(state, exchange_seconds=seconds), current, accepted, electorate, now)


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
        position=next_position(current.plan, rules.batch_size, rules.late_steps),
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


def _names(nodes: Iterable[str]) -> str:
    return ", ".join(node[-6:] for node in sorted(nodes))
