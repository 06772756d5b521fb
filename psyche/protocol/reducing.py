"""The stage of a sharded round between holding payloads and voting: its slices are added up, by k nodes each.

Who does not report in time is replaced by the next on the ring, within the round; where reports contradict each other
one more node is drawn; a contribution that a group's reducers cannot get is given up rather than waited for.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from psyche.protocol.admission import Step
from psyche.protocol.proposals import abandon, exchange_allowed, living, propose
from psyche.protocol.reduction import Draw, minority, verdict
from psyche.protocol.state import Round, Rules, State


def draw_of(rules: Rules, current: Round) -> Draw:
    """Who reduces what in ``current`` now."""
    slices = rules.slices_in(current.plan.round)
    return Draw(current.ring, current.out, current.again, current.plan.reducers, slices)


def select(
    rules: Rules, state: State, current: Round, selected: frozenset[str], out: Collection[str], now: float
) -> Step:
    """Have ``selected`` contributions reduced, without the help of ``out``, in a term of its own."""
    if not selected:
        return abandon(state, current, "no payload can be reduced")
    out = frozenset(out)
    if out >= set(current.ring):  # nobody was ready; all are asked once more
        out = frozenset(current.ring) - set(living(state, current))
    if out >= set(current.ring):
        return abandon(state, current, "no reducer is left")
    term = state.term + 1
    reducing = replace(
        current,
        selected=selected,
        out=out,
        again=(),
        reports={},
        term=term,
        selected_in=term,
        deadline=now + exchange_allowed(rules, state),
    )
    return replace(state, term=term, round=reducing), []


def collect_results(rules: Rules, state: State, current: Round, now: float) -> Step:
    """Wait for the reports; propose the record once every group has a result to believe."""
    here = set(living(state, current))
    draw = draw_of(rules, current)
    gone = set(current.ring) - here - current.out
    if silent := {node for group in range(draw.groups) for node in _unreported(draw, current, group) if node in gone}:
        return _replace_reducers(rules, state, current, silent, now)
    waiting = [group for group in range(draw.groups) if _unreported(draw, current, group)]
    if waiting and now < current.deadline:
        return state, []
    if silent := {node for group in waiting for node in _unreported(draw, current, group)}:
        return _after_deadline(rules, state, current, draw, silent, now)
    return _judge(rules, state, current, draw, now)


def _judge(rules: Rules, state: State, current: Round, draw: Draw, now: float) -> Step:
    """Every group has all the reports it will get: believe those that agree, ask one more where they do not."""
    reports = [current.reports.get(group, {}) for group in range(draw.groups)]
    roots = [verdict(found) for found in reports]
    disputed = tuple(group for group, root in enumerate(roots) if root is None)
    if disputed:
        wider = replace(
            current, again=tuple(sorted((*current.again, *disputed))), deadline=now + exchange_allowed(rules, state)
        )
        if all(draw_of(rules, wider).reducers_of(group) == draw.reducers_of(group) for group in disputed):
            return abandon(state, current, "the reducers contradict each other, and nobody is left to ask")
        return replace(state, round=wider), []
    results = tuple(root for root in roots if root is not None)
    losers = {node for found, root in zip(reports, results, strict=True) for node in minority(found, root)}
    electorate = tuple(member.node for member in current.plan.members)
    return propose(rules, state, current, current.selected, electorate, now, results, losers)


def _after_deadline(rules: Rules, state: State, current: Round, draw: Draw, silent: set[str], now: float) -> Step:
    """Who has not reported either cannot, for want of a payload that is given up then, or is too slow."""
    stuck = [group for group in range(draw.groups) if not current.reports.get(group)]
    lost = frozenset(
        one
        for group in stuck
        for one in current.selected
        if all(one not in current.holdings.get(node, frozenset()) for node in draw.reducers_of(group))
    )
    if lost:
        return select(rules, state, current, current.selected - lost, current.out, now)
    return _replace_reducers(rules, state, current, silent, now)


def _replace_reducers(rules: Rules, state: State, current: Round, silent: set[str], now: float) -> Step:
    """Put nodes out; what they would have reduced goes to the next on the ring."""
    out = current.out | silent
    if out >= set(current.ring):
        draw = draw_of(rules, current)
        if all(current.reports.get(group) for group in range(draw.groups)):
            return _judge(rules, state, current, draw, now)  # fewer than k, but nobody else is left to ask
        return abandon(state, current, "no reducer is left")
    return replace(state, round=replace(current, out=out, deadline=now + exchange_allowed(rules, state))), []


def _unreported(draw: Draw, current: Round, group: int) -> list[str]:
    reports = current.reports.get(group, {})
    return [node for node in draw.reducers_of(group) if node not in reports]
