"""The stage of a sharded round between holding payloads and voting: its slices are added up, by k nodes each.

Who does not report in time is replaced by the next on the ring, within the round; where reports contradict each other
one more node is drawn. What nobody may gain by:

- keeping a slice of its own payload from the others that reduce it, so that they cannot report and its word stands
  alone. A contribution that most of the nodes tried could not get for a group is given up, and no result is believed
  on fewer than k reports while k nodes are here.
- saying that others' contributions were not to be had. It takes more than one to say so of a group, and who lacks
  much is itself at fault.
- reporting a result and keeping its bytes to itself and its friends, who would be the only ones to vote. Results that
  did not reach half of the members that are here end the attempt; the next one is gathered.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from psyche.protocol.admission import Step, observed
from psyche.protocol.proposals import abandon, allowed, electors, half, living, propose
from psyche.protocol.reduction import ReducerAssignment, dissenters, verdict
from psyche.protocol.state import Round, Rules, State


def assignment_of(rules: Rules, current: Round) -> ReducerAssignment:
    """Who reduces what in ``current`` now."""
    slices = rules.slices_in(current.plan.round)
    return ReducerAssignment(current.reducer_order, current.out, current.again, current.plan.reducers, slices)


def select(
    rules: Rules, state: State, current: Round, selected: frozenset[str], out: Collection[str], now: float
) -> Step:
    """Have ``selected`` contributions reduced, without the help of ``out``, in a term of its own."""
    if not selected:
        return abandon(state, current, "no payload can be reduced")
    here = set(living(state, current))
    out = frozenset(out)
    if out >= set(current.reducer_order):  # nobody was ready; all are asked once more
        out = frozenset(current.reducer_order) - here
    if out >= set(current.reducer_order):
        return abandon(state, current, "no reducer is left")
    chosen = replace(
        current,
        selected=selected,
        out=frozenset(),
        again=(),
        reports={},
        fetched=frozenset(),
        lacking={},
        term=state.term + rules.coordinators,
    )
    lacking = _lacking(chosen, assignment_of(rules, chosen), out & here)
    reducing = replace(chosen, out=out, lacking=lacking, selected_in=chosen.term)
    return replace(state, term=chosen.term, round=_begun(rules, state, reducing, now)), []


def collect_results(rules: Rules, state: State, current: Round, now: float) -> Step:
    """Wait for the reports; propose the record once every group has a result to believe."""
    here = set(living(state, current))
    assignment = assignment_of(rules, current)
    waiting = {group: nodes for group in range(assignment.groups) if (nodes := _unreported(assignment, current, group))}
    silent = frozenset(node for nodes in waiting.values() for node in nodes)
    if gone := silent - here:
        return _put_out(rules, state, current, gone, now)
    if silent and now < current.deadline:
        return state, []
    if silent:
        return _after_deadline(rules, state, current, silent, now)
    return _judge(rules, state, current, assignment, now)


def vote_anew(rules: Rules, state: State, current: Round, now: float) -> Step:
    """The deadline of a vote on results has passed: go on with those who voted, if they are half of who is here.

    A voter has all results, and serves them. Where fewer voted all are asked once more: it may have been the line.
    """
    record = current.proposal
    assert record is not None
    here = living(state, current)
    voted = [node for node in here if node in current.votes]
    late = (now - current.since for node in here if node in record.electorate and node not in current.votes)
    state = replace(state, result_seconds=observed(state.result_seconds, *late))
    votes = {member.node: member.votes for member in current.plan.members}
    enough = half(sum(votes[node] for node in voted), sum(votes[node] for node in here))
    if not enough and current.proposals > 1:
        return abandon(state, current, "the results did not reach half of the members")
    electorate = electors(rules, state, voted if enough else here)
    accepted = frozenset(one.node for one in record.accepted)
    return propose(rules, state, current, accepted, electorate, now, record.results, record.dissenters)


def reduce_anew(rules: Rules, state: State, current: Round, results: Sequence[bytes], now: float) -> Step | None:
    """Back to the reduction of groups whose result is lost, because all who had it went away; None where none is."""
    here = set(living(state, current))
    believed = {
        group: {node for node, found in current.reports[group].items() if found == root}
        for group, root in enumerate(results)
    }
    lost = {group: nodes for group, nodes in believed.items() if not (nodes | current.fetched) & here}
    gone = frozenset(node for nodes in lost.values() for node in nodes)
    if not lost or gone | current.out >= set(current.reducer_order):
        return None
    reports = {group: found for group, found in current.reports.items() if group not in lost}
    reducing = replace(current, proposal=None, votes={}, fetched=frozenset(), reports=reports)
    return _put_out(rules, state, reducing, gone, now)


# -------------------------------------------------------------------------------------- helpers


def _judge(rules: Rules, state: State, current: Round, assignment: ReducerAssignment, now: float) -> Step:
    """Every group has all the reports it will get: believe those that agree, ask one more where they do not."""
    reports = [current.reports.get(group, {}) for group in range(assignment.groups)]
    least = min(assignment.reducers, len(set(assignment.reducer_order) & set(living(state, current))))
    if any(len(found) < least for found in reports):
        return abandon(state, current, "too few reducers reported to be believed")
    roots = [verdict(found) for found in reports]
    disputed = tuple(group for group, root in enumerate(roots) if root is None)
    if disputed:
        wider = replace(current, again=tuple(sorted((*current.again, *disputed))))
        if any(assignment_of(rules, wider).reducers_of(group) == assignment.reducers_of(group) for group in disputed):
            return abandon(state, current, "the reducers contradict each other, and nobody is left to ask")
        return replace(state, round=_begun(rules, state, wider, now)), []
    results = tuple(root for root in roots if root is not None)
    if step := reduce_anew(rules, state, current, results, now):
        return step
    losers = {node for found, root in zip(reports, results, strict=True) for node in dissenters(found, root)}
    return propose(rules, state, current, current.selected, None, now, results, losers)


def _after_deadline(rules: Rules, state: State, current: Round, silent: frozenset[str], now: float) -> Step:
    """Who has not reported either cannot, for want of a payload that is given up then, or is too slow."""
    late = (now - current.since for _ in silent)
    state = replace(state, reduce_seconds=observed(state.reduce_seconds, *late))
    assignment = assignment_of(rules, current)
    current = replace(current, lacking=_lacking(current, assignment, silent))
    lost = frozenset(
        one for group in range(assignment.groups) for one in current.selected if _withheld(current, group, one)
    )
    if not lost:
        return _put_out(rules, state, current, silent, now)
    # Who was put out for want of just these may help again.
    wanted = {node: _wants(current, node) for node in current.out & set(living(state, current))}
    excused = {node for node, lacked in wanted.items() if lacked and lacked <= lost}
    return select(rules, state, current, current.selected - lost, current.out - excused, now)


def _withheld(current: Round, group: int, one: str) -> bool:
    """Whether a contribution is to be given up: more nodes lack it for a group than have reported on the group.

    The word of its author does not count, and that of one node alone is not enough.
    """
    lack = sum(one in lacked for lacked in current.lacking.get(group, {}).values())
    have = sum(node != one for node in current.reports.get(group, {}))
    return lack > max(1, have)


def _lacking(
    current: Round, assignment: ReducerAssignment, nodes: Collection[str]
) -> Mapping[int, Mapping[str, frozenset[str]]]:
    """``current.lacking`` with what ``nodes`` lack of the groups they reduce; without who lacks more than a third."""
    lacking = {group: dict(found) for group, found in current.lacking.items()}
    for node in nodes:
        lacked = current.selected - current.holdings.get(node, frozenset())
        if lacked and 3 * len(lacked) <= len(current.selected):
            for group in assignment.duties(node):
                lacking.setdefault(group, {})[node] = lacked
    return lacking


def _wants(current: Round, node: str) -> frozenset[str]:
    """All that ``node`` was found to lack."""
    return frozenset[str]().union(*(found.get(node, frozenset()) for found in current.lacking.values()))


def _put_out(rules: Rules, state: State, current: Round, nodes: frozenset[str], now: float) -> Step:
    """Go on without ``nodes``; what they would have reduced goes to the next on the ring."""
    out = current.out | nodes
    if out >= set(current.reducer_order):
        assignment = assignment_of(rules, current)
        if all(current.reports.get(group) for group in range(assignment.groups)):
            return _judge(rules, state, current, assignment, now)  # fewer than k, but nobody else is left to ask
        return abandon(state, current, "no reducer is left")
    return replace(state, round=_begun(rules, state, replace(current, out=out), now)), []


def _begun(rules: Rules, state: State, current: Round, now: float) -> Round:
    return replace(current, since=now, deadline=now + allowed(rules, state.reduce_seconds))


def _unreported(assignment: ReducerAssignment, current: Round, group: int) -> list[str]:
    reports = current.reports.get(group, {})
    return [node for node in assignment.reducers_of(group) if node not in reports]
