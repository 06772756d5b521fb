"""How many inner steps each member owes, so that all end together (DESIGN §6).

The coordinator measures, nobody declares: a member's speed in a round is the inner steps it did in the time that it
had for them, over the seconds from the plan to its commitment. Late steps, taken while the round before was on the
wire, cost none of that time and are no part of it: to claim more of them is to look slower, and to claim fewer is to
owe more. Encoding and the way to the coordinator are in the seconds, for it is commitments that are to come together.

The fastest owes the manifest's H, the others what they do meanwhile. Who commits at once to steps it has not taken is
for audits to find; until then it can make rounds short, but no shorter than ``EXCHANGES`` allows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import median

from psyche.protocol.messages import Member, Plan, Record
from psyche.protocol.state import Round, Rules, Stage, State

WINDOW = 5
"""Rounds that a speed is the median of. Four equal nodes that differ by 5 % (σ) from round to round then all owe H in
97 of 100 rounds, eight in 89; with three rounds in 88 and 67 (2000 simulated rounds each)."""
ALIKE = 0.1
"""Who is slower than the fastest by no more than this owes H as well. Equal machines differ by a few percent from round
to round, and their steps should not; what it costs is that the others wait for as long."""
EXCHANGES = 2.0
"""A round trains for at least so many times as long as its exchange takes, unless all owe H before that. So a liar
leaves the others two thirds of the time to train in. An honest node waits for it only where its own H steps take less,
and there a third of its time goes to exchanges anyway. (A bound over the median speed would hold up every GPU among
laptops.)"""

Speeds = Mapping[str, tuple[float, ...]]
"""Inner steps a second of each node in its last rounds, at most ``WINDOW`` of them, the latest last."""


def quotas(
    most: int,
    members: Collection[str],
    voters: Collection[str],
    speeds: Speeds,
    last: Mapping[str, int],
    exchange: float = 0.0,
) -> dict[str, int]:
    """Inner steps that each of ``members`` owes, from 1 to ``most``, which is H.

    ``last`` is what each did in the last round: where nothing was measured yet, under a new leader say, that says it.
    Of whom nothing at all is known as much is asked as of the slowest. Only ``voters`` make others owe less: identities
    are free. ``exchange`` is how many seconds one takes, 0 where that is not known.
    """
    speed = {node: median(speeds[node]) for node in members if speeds.get(node)}
    judged = [speed[node] for node in speed if node in voters] or list(speed.values())
    owed = {node: min(most, last[node]) for node in members if node in last}
    if judged:
        seconds = max(most / max(judged), EXCHANGES * exchange)
        full = most / seconds
        owed |= {node: _share(most, found / full) for node, found in speed.items()}
    slowest = min(owed.values(), default=most)
    return {node: owed.get(node, slowest) for node in members}


def _share(most: int, speed: float) -> int:
    """Of H, at a ``speed`` relative to one that does H in a round. Rounded down: all would wait for a step too many."""
    return most if speed >= 1 - ALIKE else max(1, int(most * speed))


def measured(speeds: Speeds, current: Round, record: Record, here: Collection[str]) -> dict[str, tuple[float, ...]]:
    """``speeds`` after ``record`` of the round ``current``, of its members and who else is ``here``; nobody else's.

    Only what was accepted counts. Who fell short of its quota is known by this round alone, not by better days; and who
    is here and did not make it at all did less than it owed in all the time there was.
    """
    due = {member.node: member.inner_steps for member in record.plan.members}
    kept = {node: found for node, found in speeds.items() if node in due or node in here}
    for one in record.accepted:
        done = one.contribution
        steps = done.inner_steps - done.overlap_steps
        seconds = current.committed_at.get(one.node, current.opened) - current.opened
        if steps > 0 and seconds > 0:
            before = () if done.inner_steps < due[one.node] else kept.get(one.node, ())
            kept[one.node] = (*before, steps / seconds)[-WINDOW:]
    lasted = 0.0 if current.stage is Stage.COMMITTING else current.closed - current.opened
    if current.committed_at and lasted > 0:  # in no time at all nobody was slow
        for node in due.keys() & set(here) - current.commitments.keys():
            kept[node] = (due[node] / lasted,)
    return kept


def done_in(record: Record) -> dict[str, int]:
    """Inner steps that each member of a round did; of who was left out, what it owed."""
    done = {one.node: one.contribution.inner_steps for one in record.accepted}
    return {member.node: done.get(member.node, member.inner_steps) for member in record.plan.members}


def planned(rules: Rules, state: State, seats: Sequence[str], voters: Collection[str]) -> tuple[Member, ...]:
    """The members of the next plan, in the order of ``seats``."""
    exchange = median(state.exchange_seconds or [0.0])
    owed = quotas(rules.inner_steps, seats, voters, state.speeds, state.last_steps, exchange)
    return tuple(Member(node, owed[node], int(node in voters)) for node in seats)


def quota_fault(plan: Plan, rules: Rules) -> str | None:
    """Why the manifest does not allow the quotas of ``plan``, or None. A weight follows from a quota: H is the most."""
    for member in plan.members:
        if member.inner_steps > rules.inner_steps:
            return f"{member.node[-6:]} is given {member.inner_steps} inner steps where H is {rules.inner_steps}"
    return None
