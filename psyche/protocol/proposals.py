"""Shared by the stages of a round: who takes part, which payloads they have in common, how a ballot is opened."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from psyche.numerics.digest import digest
from psyche.protocol.admission import Step
from psyche.protocol.assignment import reducer_order
from psyche.protocol.audits import admissible, audits_after, busy
from psyche.protocol.messages import Accepted, Excluded, ExclusionReason, Plan, Record
from psyche.protocol.pacing import exchange_allowance
from psyche.protocol.round_state import Abandoned, Ballot, Phase, Proposed, Reduction, Round, Rules, Stage, State
from psyche.protocol.standing import newly_audited, standing_after, voting
from psyche.protocol.wire import MAX_MEMBERS


def quorum(yes: int, total: int) -> bool:
    """More than two thirds of the voting weight."""
    return 3 * yes > 2 * total


def round_seed(previous: bytes) -> bytes:
    """Derive the seed of a round from the previous record, not from a clock or a proposer's choice."""
    return digest("seed", previous)


def close_commitments(rules: Rules, state: State, current: Round, now: float) -> Round:
    """Return the round in its next stage: members reveal, and the reducers of a sharded round are known."""
    plan = current.plan
    return replace(
        current,
        stage=Stage.REVEALING,
        closed=now,
        deadline=now + exchange_allowance(rules, state.exchange_seconds),
        reduction=Reduction(reducer_order(plan.seed, current.commitments)) if plan.is_sharded else None,
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
        electorate=state.electorate,
        suspects=state.suspects & {one.node for one in state.audit_state.pool.given},
        rules=rules,
    )
    standing = standing_after(
        state.standing,
        round_number=plan.round,
        electorate=state.electorate,
        accepted=accepted,
        audited=newly_audited(audit_state, plan.round),
        rules=rules,
    )
    excluded = tuple(
        Excluded(member.node, exclusion_reason(state, current, member.node))
        for member in plan.members
        if member.node not in accepted
    )
    may_vote = accepted | set(present_members(state, current)) | auditing_voters(rules, state, plan)
    may_vote -= set(audit_state.banned)
    record = Record(
        plan=plan,
        accepted=given,
        excluded=excluded,
        reconfiguration=state.reconfiguration,
        electorate=state.electorate,
        voters=tuple(voting(may_vote, standing=standing, electorate=state.electorate, probation=rules.probation)),
        standing=standing,
        audit_state=audit_state,
        reducer_order=current.reduction.reducer_order if current.reduction else (),
        results=results,
        dissenters=tuple(sorted(dissenters)),
    )
    return open_ballot(rules, state, current, record, now)


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


def eligible_voters(rules: Rules, state: State, nodes: Iterable[str]) -> list[str]:
    """Return those of ``nodes`` that may have a vote in the next round, in ascending order."""
    return voting(nodes, standing=state.standing, electorate=state.electorate, probation=rules.probation)


def reconfiguration_electorate(rules: Rules, state: State, nodes: Sequence[str]) -> tuple[str, ...]:
    """Return the electorate of a reconfiguration; nodes on probation are in it only where there are no others."""
    return tuple(eligible_voters(rules, state, nodes) or sorted(nodes))


def common_payloads(
    current: Round, candidates: frozenset[str], among: Sequence[str], enough: Callable[[int, int], bool]
) -> tuple[frozenset[str], list[str]]:
    """Return contributions that ``enough`` of the members ``among`` hold all of, and those members.

    The least held contributions are given up first; both are empty if no set of them is held by enough.
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


def at_least_half(yes: int, total: int) -> bool:
    return total > 0 and 2 * yes >= total


def draw_seats(rules: Rules, state: State, ready: Sequence[str]) -> list[str]:
    """Return as many of ``ready`` as a plan has room for: nodes with a vote first, then others, drawn by the seed."""
    if len(ready) <= MAX_MEMBERS:
        return list(ready)
    seed = round_seed(state.head)
    first = set(eligible_voters(rules, state, ready))
    drawn = sorted(ready, key=lambda node: (node not in first, digest("seat", seed, node.encode())))
    return sorted(drawn[:MAX_MEMBERS])


def members_in_training(rules: Rules, state: State, seats: Sequence[str]) -> list[str]:
    """Return the nodes of ``seats`` that train in the next round; auditors replay a contribution instead.

    So nobody waits for an audit. At most half of the nodes audit at a time, drawn by the round's seed, and never so
    many that fewer train than a round needs.
    """
    seed, least = round_seed(state.head), max(rules.min_members, (len(seats) + 1) // 2)
    auditing = busy(state.audit_state, state.rounds + 1, rules.audits, state.audit_statements.values()) & set(seats)
    away = sorted(auditing, key=lambda node: digest("seat", seed, node.encode()))[: max(0, len(seats) - least)]
    return [node for node in seats if node not in away]


def auditing_voters(rules: Rules, state: State, plan: Plan) -> frozenset[str]:
    """Return voters that are here and audit while ``plan``'s members train: they keep their vote."""
    auditing = busy(state.audit_state, plan.round, rules.audits) & set(state.electorate)
    return frozenset(
        node for node in auditing if node in state.peers and state.peers[node].state_root == plan.base_root
    )


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
    """Whether members that have not committed yet hold up more than half of the others."""
    here = present_members(state, current)
    return 2 * sum(node in current.commitments for node in here) > len(here) - 1


def has_quorum(voters: Iterable[str], electorate: Sequence[str]) -> bool:
    """Whether ``voters`` have more than two thirds of the electorate's voting weight."""
    return quorum(len(set(voters) & set(electorate)), len(electorate))


def nodes_reporting(mapping: Mapping[str, bytes], value: bytes) -> list[str]:
    return [key for key, found in mapping.items() if found == value]


def short_names(nodes: Iterable[str]) -> str:
    return ", ".join(node[-6:] for node in sorted(nodes))
