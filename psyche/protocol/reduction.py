"""The stage REDUCING of a sharded round: k nodes add up each group of slices and report the address of the result.

A reducer that does not report in time is replaced by the next in the reducer order, within the round. Where reports
contradict each other, one more node reduces the group. Three attacks that the rules exclude:

- A reducer keeps a slice of its own payload from the other reducers, so that they cannot report and its result stands
  alone. Therefore a contribution that most of a group's reducers could not fetch is given up, and no result is believed
  on fewer than k reports while k nodes are here.
- A reducer claims that it could not fetch the contributions of others. Therefore it takes more than one such claim in a
  group, and a reducer that lacks more than a third of the contributions counts as faulty itself.
- A reducer reports a result and serves its bytes to its friends only, who would then be the only voters. Therefore the
  attempt ends where results did not reach half of the members that are here; the next attempt is gathered.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from psyche.protocol.admission import Step
from psyche.protocol.assignment import ReducerAssignment, assignment_of, dissenters, verdict
from psyche.protocol.pacing import exchange_allowance, observed
from psyche.protocol.proposals import (
    abandon,
    present_members,
    propose,
    reconfiguration_electorate,
)
from psyche.protocol.round_state import Ballot, Reduction, Round, Rules, Stage, State
from psyche.protocol.standing import at_least_half, total


def select(
    rules: Rules,
    state: State,
    current: Round,
    before: Reduction,
    selected: frozenset[str],
    failed: Collection[str],
    now: float,
) -> Step:
    """Have the ``selected`` contributions reduced without the nodes ``failed``, in a new term."""
    if not selected:
        return abandon(state, current, "no payload can be reduced")
    reducers, here = set(before.reducer_order), set(present_members(state, current))
    failed = frozenset(failed)
    if failed >= reducers:  # nobody was ready: ask all once more
        failed = frozenset(reducers - here)
    if failed >= reducers:
        return abandon(state, current, "no reducer is left")
    term = state.term + rules.coordinators
    reduction = Reduction(before.reducer_order, term, selected=selected)
    assignment = assignment_of(rules, current.plan, reduction)
    lacking = _with_lacking(current, reduction, assignment, failed & here)
    current = replace(current, term=term)
    return _reduce(rules, replace(state, term=term), current, replace(reduction, failed=failed, lacking=lacking), now)


def collect_results(rules: Rules, state: State, current: Round, now: float) -> Step:
    """Wait for the reports; propose the record once every group has a result to believe."""
    reduction = current.reduction
    assert reduction is not None
    here = set(present_members(state, current))
    assignment = assignment_of(rules, current.plan, reduction)
    silent = frozenset(node for group in range(assignment.groups) for node in _unreported(assignment, reduction, group))
    if gone := silent - here:
        return _replace_failed(rules, state, current, reduction, gone, now)
    if silent and now < current.deadline:
        return state, []
    if silent:
        return _after_deadline(rules, state, current, reduction, silent, now)
    return _decide(rules, state, current, reduction, now)


def vote_anew(rules: Rules, state: State, current: Round, ballot: Ballot, now: float) -> Step:
    """Go on after the deadline of a vote on results: with the voters, if they are half of the members that are here.

    A voter has all results and serves them. Where fewer voted, all are asked once more: lines may have been slow.
    """
    record, here = ballot.record, present_members(state, current)
    voted = [node for node in here if node in ballot.votes]
    late = (now - ballot.since for node in here if node in record.electorate and node not in ballot.votes)
    state = replace(state, result_seconds=observed(state.result_seconds, *late))
    votes = current.plan.weights
    enough = at_least_half(total(votes, voted), total(votes, here))
    if not enough and current.ballots > 1:
        return abandon(state, current, "the results did not reach half of the members")
    electorate = reconfiguration_electorate(state, voted if enough else here)
    accepted = frozenset(one.node for one in record.accepted)
    return propose(rules, state, current, accepted, electorate, now, record.results, record.dissenters)


def reduce_anew(rules: Rules, state: State, current: Round, results: Sequence[bytes], now: float) -> Step | None:
    """Reduce groups again whose result is lost, because all nodes that had it are gone; None where none is lost."""
    reduction = current.reduction
    assert reduction is not None
    here = set(present_members(state, current))
    believed = {
        group: {node for node, found in reduction.reports[group].items() if found == root}
        for group, root in enumerate(results)
    }
    lost = {group: nodes for group, nodes in believed.items() if not (nodes | reduction.have_results) & here}
    gone = frozenset(node for nodes in lost.values() for node in nodes)
    if not lost or gone | reduction.failed >= set(reduction.reducer_order):
        return None
    reports = {group: found for group, found in reduction.reports.items() if group not in lost}
    reduction = replace(reduction, have_results=frozenset(), reports=reports)
    return _replace_failed(rules, state, replace(current, ballot=None), reduction, gone, now)


# -------------------------------------------------------------------------------------- helpers


def _reduce(rules: Rules, state: State, current: Round, reduction: Reduction, now: float) -> Step:
    """Begin, or begin anew, to wait for the reports of ``reduction``."""
    deadline = now + exchange_allowance(rules, state.reduce_seconds)
    reducing = replace(current, stage=Stage.REDUCING, deadline=deadline, reduction=replace(reduction, since=now))
    return replace(state, round=reducing), []


def _decide(rules: Rules, state: State, current: Round, reduction: Reduction, now: float) -> Step:
    """Every group has all the reports it will get: believe those that agree, ask one more node where they do not."""
    assignment = assignment_of(rules, current.plan, reduction)
    reports = [reduction.reports.get(group, {}) for group in range(assignment.groups)]
    least = min(assignment.reducers, len(set(assignment.reducer_order) & set(present_members(state, current))))
    if any(len(found) < least for found in reports):
        return abandon(state, current, "too few reducers reported to be believed")
    roots = [verdict(found) for found in reports]
    disputed = tuple(group for group, root in enumerate(roots) if root is None)
    if disputed:
        wider = replace(reduction, reassigned=tuple(sorted((*reduction.reassigned, *disputed))))
        more = assignment_of(rules, current.plan, wider)
        if any(more.reducers_of(group) == assignment.reducers_of(group) for group in disputed):
            return abandon(state, current, "the reducers contradict each other, and nobody is left to ask")
        return _reduce(rules, state, current, wider, now)
    results = tuple(root for root in roots if root is not None)
    if step := reduce_anew(rules, state, current, results, now):
        return step
    losers = {node for found, root in zip(reports, results, strict=True) for node in dissenters(found, root)}
    return propose(rules, state, current, reduction.selected, None, now, results, losers)


def _after_deadline(
    rules: Rules, state: State, current: Round, reduction: Reduction, silent: frozenset[str], now: float
) -> Step:
    """Handle reducers that have not reported: they lack a payload, which is given up then, or they are too slow."""
    late = (now - reduction.since for _ in silent)
    state = replace(state, reduce_seconds=observed(state.reduce_seconds, *late))
    assignment = assignment_of(rules, current.plan, reduction)
    reduction = replace(reduction, lacking=_with_lacking(current, reduction, assignment, silent))
    lost = frozenset(
        one for group in range(assignment.groups) for one in reduction.selected if _is_withheld(reduction, group, one)
    )
    if not lost:
        return _replace_failed(rules, state, current, reduction, silent, now)
    # Reducers that failed for want of just these contributions may help again.
    lacked = {node: _lacked_by(reduction, node) for node in reduction.failed & set(present_members(state, current))}
    auditing_voters = {node for node, missing in lacked.items() if missing and missing <= lost}
    return select(rules, state, current, reduction, reduction.selected - lost, reduction.failed - auditing_voters, now)


def _is_withheld(reduction: Reduction, group: int, one: str) -> bool:
    """Return whether the contribution of ``one`` is given up: more nodes lack it for a group than have reported on the
    group.

    The report of its author does not count, and the claim of a single node is not enough.
    """
    lack = sum(one in lacked for lacked in reduction.lacking.get(group, {}).values())
    have = sum(node != one for node in reduction.reports.get(group, {}))
    return lack > max(1, have)


def _with_lacking(
    current: Round, reduction: Reduction, assignment: ReducerAssignment, nodes: Collection[str]
) -> Mapping[int, Mapping[str, frozenset[str]]]:
    """Return ``reduction.lacking`` with what ``nodes`` lack of their groups. Nodes lacking over a third are ignored."""
    lacking = {group: dict(found) for group, found in reduction.lacking.items()}
    for node in nodes:
        lacked = reduction.selected - current.holdings.get(node, frozenset())
        if lacked and 3 * len(lacked) <= len(reduction.selected):
            for group in assignment.duties(node):
                lacking.setdefault(group, {})[node] = lacked
    return lacking


def _lacked_by(reduction: Reduction, node: str) -> frozenset[str]:
    """Return all contributions that ``node`` was found to lack."""
    return frozenset[str]().union(*(found.get(node, frozenset()) for found in reduction.lacking.values()))


def _replace_failed(
    rules: Rules, state: State, current: Round, reduction: Reduction, nodes: frozenset[str], now: float
) -> Step:
    """Go on without ``nodes``; their groups go to the next nodes in the reducer order."""
    failed = reduction.failed | nodes
    if failed >= set(reduction.reducer_order):
        assignment = assignment_of(rules, current.plan, reduction)
        if all(reduction.reports.get(group) for group in range(assignment.groups)):
            # Fewer than k reports, but nobody else is left to ask.
            return _decide(rules, state, replace(current, reduction=reduction), reduction, now)
        return abandon(state, current, "no reducer is left")
    return _reduce(rules, state, current, replace(reduction, failed=failed), now)


def _unreported(assignment: ReducerAssignment, reduction: Reduction, group: int) -> list[str]:
    """Return the reducers of ``group`` that have not reported on it."""
    reports = reduction.reports.get(group, {})
    return [node for node in assignment.reducers_of(group) if node not in reports]
