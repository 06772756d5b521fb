"""Shared by the stages of a round: who takes part, which payloads they have in common, how a ballot is opened."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from psyche.numerics.digest import digest
from psyche.protocol.admission import Step
from psyche.protocol.assignment import reducer_order
from psyche.protocol.audits import admissible, audits_after, busy
from psyche.protocol.messages import NO_COMMITMENT, Accepted, Excluded, ExclusionReason, Record
from psyche.protocol.pacing import exchange_allowance
from psyche.protocol.round_state import Abandoned, Ballot, Phase, Proposed, Reduction, Round, Rules, Stage, State
from psyche.protocol.standing import (
    founding_weights,
    restricted,
    standing_after,
    total,
    weights_of,
)
from psyche.protocol.wire import MAX_MEMBERS


def round_seed(previous: bytes) -> bytes:
    """Derive the seed of a round from the previous record, not from a clock or a proposer's choice."""
    return digest("seed", previous)


def close_commitments(rules: Rules, state: State, current: Round, now: float) -> Round:
    """Return the round in its next stage: members reveal, and the reducers of a sharded round are known."""
    plan = current.plan
    closed = {node: commitment for node, (commitment, _) in current.commitments.items()}
    return replace(
        current,
        stage=Stage.REVEALING,
        closed=now,
        deadline=now + exchange_allowance(rules, state.exchange_seconds),
        reduction=Reduction(reducer_order(plan, closed)) if plan.is_sharded else None,
    )


def propose(
    rules: Rules,
    state: State,
    current: Round,
    accepted: frozenset[str],
    electorate: tuple[str, ...] | None,
    now: float,
    results: tuple[bytes, ...] = (),
    dissenters: Collection[str] = (),
) -> Step:
    """Build a record and open a ballot on it. An ``electorate`` other than the one in force takes a reconfiguration.

    So does a record other than the one that an earlier leader may have certified: by signing the reconfiguration, the
    coordinators confirm that it was not.
    """
    plan = current.plan
    if (electorate is not None and set(electorate) != set(state.electorate)) or state.maybe_certified:
        state = with_electorate(state, state.electorate if electorate is None else electorate)
    given = tuple(Accepted(node, current.contributions[node][0]) for node in sorted(accepted))
    audit_state = audits_after(
        state.audit_state,
        state.standing,
        list(admissible(state.audit_state, state.audit_statements.values(), plan.round, rules.audits)),
        plan=plan,
        accepted=given,
        electorate=electorate_weights(state),
        suspects=state.suspects & {one.node for one in state.audit_state.pool.given},
        rules=rules,
    )
    weights = electorate_weights(state)
    standing = standing_after(
        state.standing,
        plan=plan,
        electorate=weights,
        accepted=given,
        audit_state=audit_state,
        audits_before=state.audit_state,
        rules=rules,
    )
    excluded = tuple(
        Excluded(member.node, exclusion_reason(state, current, member.node))
        for member in plan.members
        if member.node not in accepted
    )
    record = Record(
        plan=plan,
        accepted=given,
        excluded=excluded,
        reconfiguration=state.reconfiguration,
        electorate=tuple(weights),
        voting_weights=tuple(weights.values()),
        standing=standing,
        audit_state=audit_state,
        commitments=_closed_commitments(current) if plan.is_sharded else (),
        reducer_order=current.reduction.reducer_order if current.reduction else (),
        results=results,
        dissenters=tuple(sorted(dissenters)),
    )
    return open_ballot(rules, state, current, record, now)


def _closed_commitments(current: Round) -> tuple[bytes, ...]:
    """Return the commitments of the plan's voters, in its order."""
    return tuple(current.commitments.get(node, (NO_COMMITMENT, b""))[0] for node in current.plan.weights)


def open_ballot(rules: Rules, state: State, current: Round, record: Record, now: float) -> Step:
    """Open a ballot on ``record``, in a new term."""
    term = state.term + rules.coordinators
    proposed = replace(
        current,
        stage=Stage.VOTING,
        term=term,
        ballot=Ballot(record, since=now),
        ballots=current.ballots + 1,
        deadline=now + exchange_allowance(rules, state.result_seconds if record.results else state.exchange_seconds),
    )
    return replace(state, term=term, round=proposed, note=""), [Proposed(term, record)]


def with_electorate(state: State, electorate: Sequence[str]) -> State:
    """Reconfigure: ``electorate`` votes in the round from now on, and no record of another one can be certified."""
    before = None if state.maybe_certified or not state.electorate else (state.electorate, state.reconfiguration)
    number = max(state.reconfiguration, state.last_reconfiguration) + 1
    voters = tuple(sorted(electorate))
    return replace(
        state,
        electorate=voters,
        reconfiguration=number,
        last_reconfiguration=number,
        replaced=before,
        maybe_certified=b"",
    )


def voting_weights(state: State) -> dict[str, int]:
    """Return the voting weights before the next round, whoever is in its electorate; nobody's before round 1."""
    return weights_of(state.standing)


def electorate_weights(state: State) -> dict[str, int]:
    """Return the voting weight of each node of the electorate in force."""
    return restricted(voting_weights(state) or founding_weights(state.electorate), state.electorate)


def reconfiguration_electorate(state: State, nodes: Iterable[str]) -> tuple[str, ...]:
    """Return the electorate of a reconfiguration: those of ``nodes`` with voting weight. In round 1, all of them."""
    weights = voting_weights(state)
    return tuple(restricted(weights, nodes) if weights else sorted(nodes))


def common_payloads(
    current: Round, candidates: frozenset[str], among: Sequence[str], enough: Callable[[int, int], bool]
) -> tuple[frozenset[str], list[str]]:
    """Return contributions that ``enough`` of the members ``among`` hold all of, and those members.

    The least held contributions are given up first; both are empty if no set of them is held by enough.
    """
    votes = current.plan.weights
    held = {node: current.holdings.get(node, frozenset()) for node in among}
    reach = {one: total(votes, (node for node in among if one in held[node])) for one in candidates}
    for given_up in sorted(candidates, key=lambda one: (reach[one], one)):
        holders = [node for node in among if candidates <= held[node]]
        if enough(total(votes, holders), total(votes, among)):
            return candidates, holders
        candidates -= {given_up}
    return frozenset(), []


def draw_seats(state: State, ready: Sequence[str]) -> list[str]:
    """Return as many of ``ready`` as a plan has room for: voters first, then others, drawn by the round's seed."""
    if len(ready) <= MAX_MEMBERS:
        return list(ready)
    seed, first = round_seed(state.head), voting_weights(state)
    drawn = sorted(ready, key=lambda node: (node not in first, digest("seat", seed, node.encode())))
    return sorted(drawn[:MAX_MEMBERS])


def members_in_training(rules: Rules, state: State, seats: Sequence[str]) -> list[str]:
    """Return the nodes of ``seats`` that train in the next round; auditors replay a contribution instead.

    So nobody waits for an audit. At most half of the voting weight audits at a time, in an order drawn by the round's
    seed, and never so many nodes that fewer train than a round needs. Audits beyond that wait: newcomers, whose audits
    take the time of voters, cannot stop a run.
    """
    seed, weights = round_seed(state.head), restricted(electorate_weights(state), seats)
    auditing = busy(state.audit_state, state.rounds + 1, rules.audits, state.audit_statements.values()) & set(seats)
    away: set[str] = set()
    for node in sorted(auditing, key=lambda node: digest("seat", seed, node.encode())):
        if len(seats) - len(away) > rules.min_members and 2 * total(weights, {*away, node}) <= total(weights):
            away.add(node)
    return [node for node in seats if node not in away]


def exclusion_reason(state: State, current: Round, node: str) -> ExclusionReason:
    """Return why the contribution of member ``node`` is not in the record."""
    if node not in state.peers:
        return ExclusionReason.LOST_CONTACT
    if node not in current.commitments:
        return ExclusionReason.NO_COMMITMENT
    if node not in current.contributions:
        return ExclusionReason.NOT_REVEALED
    return ExclusionReason.NOT_HELD


def abandon(state: State, current: Round, reason: str) -> Step:
    """End the round without a record. Durations behind deadlines that could not be kept are forgotten.

    Those of an exchange are forgotten only if there was one, or its next would be given the longest time for nodes that
    do not take part. A sharded round is tried again as a gathered one, because the same reducers would be drawn.
    """
    if state.maybe_certified:
        state = with_electorate(state, state.electorate)
    waiting = replace(
        state,
        phase=Phase.WAITING,
        round=None,
        note=reason,
        commit_seconds=(),
        force_gather=current.reduction is not None,
    )
    if current.stage is not Stage.COMMITTING:
        waiting = replace(waiting, exchange_seconds=(), reduce_seconds=(), result_seconds=())
    return waiting, [Abandoned(current.plan.round, reason)]


def present_members(state: State, current: Round) -> list[str]:
    """Return members that are here and can still take part; one that came back without the base state cannot."""
    return [
        member.node
        for member in current.plan.members
        if (peer := state.peers.get(member.node)) is not None
        and (peer.state_root == current.plan.base_root or member.node in current.attestations)
    ]


def mostly_done(state: State, current: Round) -> bool:
    """Return whether a member that has not committed yet holds up more than half of the others' voting weight."""
    weights = restricted(current.plan.weights, present_members(state, current))
    missing = (weight for node, weight in weights.items() if node not in current.commitments)
    return 2 * total(weights, current.commitments) > total(weights) - max(missing, default=0)


def nodes_reporting(mapping: Mapping[str, bytes], value: bytes) -> list[str]:
    return [key for key, found in mapping.items() if found == value]


def short_names(nodes: Iterable[str]) -> str:
    return ", ".join(node[-6:] for node in sorted(nodes))
