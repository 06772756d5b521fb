"""How much work and how much time members get, from what was measured: quotas of inner steps, and deadlines.

The coordinator measures; no node declares its own speed. A member's speed in a round is its inner steps, without those
taken while the round before was on the wire, over the seconds from the plan to its commitment. To claim more
overlapped steps is to look slower, and to claim fewer is to owe more. Encoding and submitting are in the seconds,
because it is the commitments that are to come in together.

The fastest member owes H steps, the others as many as they do meanwhile. A node that commits at once to steps it has
not taken is for audits to find; until then it can shorten rounds, but no further than ``EXCHANGES`` allows.

Deadlines are median + k·MAD of recent durations, within the manifest's bounds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import median

from psyche.protocol.messages import Member, Plan, Record
from psyche.protocol.round_state import Round, Rules, Stage, State

SPEED_WINDOW = 5
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
"""Inner steps a second of each node in its last rounds, at most ``SPEED_WINDOW`` of them, the latest last."""


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
            kept[one.node] = (*before, steps / seconds)[-SPEED_WINDOW:]
    lasted = 0.0 if current.stage is Stage.COMMITTING else current.closed - current.opened
    if current.committed_at and lasted > 0:  # in no time at all nobody was slow
        for node in due.keys() & set(here) - current.commitments.keys():
            kept[node] = (due[node] / lasted,)
    return kept


def done_in(record: Record) -> dict[str, int]:
    """Inner steps that each member of a round did; of who was left out, what it owed."""
    done = {one.node: one.contribution.inner_steps for one in record.accepted}
    return {member.node: done.get(member.node, member.inner_steps) for member in record.plan.members}


def planned(rules: Rules, state: State, seats: Sequence[str], weights: Mapping[str, int]) -> tuple[Member, ...]:
    """Return the members of the next plan, in the order of ``seats``, with their voting weights."""
    exchange = median(state.exchange_seconds or [0.0])
    owed = quotas(rules.inner_steps, seats, weights, state.speeds, state.last_steps, exchange)
    return tuple(Member(node, owed[node], weights.get(node, 0)) for node in seats)


def quota_fault(plan: Plan, rules: Rules) -> str | None:
    """Why the manifest does not allow the quotas of ``plan``, or None. A weight follows from a quota: H is the most."""
    for member in plan.members:
        if member.inner_steps > rules.inner_steps:
            return f"{member.node[-6:]} is given {member.inner_steps} inner steps where H is {rules.inner_steps}"
    return None


DEADLINE_WINDOW = 64
"""How many recent observations a deadline rests on."""
SPREAD = 5.0
"""How many MADs above the median a deadline lies. For normally distributed times (MAD = 0.67 σ) this is 3.4 σ: the
deadline cuts off one honest node in 2,700."""


def adaptive(observed: Sequence[float], *, least: float, most: float, deviation: float = 0.0) -> float:
    """median + ``SPREAD`` × MAD of ``observed`` seconds, within [least, most]; ``most`` before any observation.

    The MAD counts as ``deviation`` of the median at least.
    """
    recent = observed[-DEADLINE_WINDOW:]
    if not recent:
        return most
    middle = median(recent)
    mad = max(median(abs(value - middle) for value in recent), deviation * middle)
    return min(max(middle + SPREAD * mad, least), most)


LEAST_DEVIATION = 0.1
"""Of exchanges, over their median: a few on quiet lines agree to the tenth of a second and say nothing of the next. At
20 Mbit/s up a third took 14.1 s after 11.5 and 11.8 s, and half of the payloads were left out."""


LEAST_DEVIATION_OF_TRAINING = 0.05
"""A machine's own steps are more regular than its line: 30 rounds that took 30.0 s say nothing against one of 31 s, in
which a newcomer fetches the state."""


def exchange_allowance(rules: Rules, seconds: Sequence[float]) -> float:
    """How long a stage of the exchange may take that has taken ``seconds`` before."""
    least, most = rules.exchange_bounds
    return adaptive(seconds, least=least, most=most, deviation=LEAST_DEVIATION)


def training_allowance(rules: Rules, state: State) -> float:
    """How long the members have until their commitments are in, after what they took before."""
    least, most = rules.round_bounds
    deviation = LEAST_DEVIATION_OF_TRAINING
    return adaptive(state.commit_seconds, least=least, most=most, deviation=deviation)


def observed(values: tuple[float, ...], *more: float) -> tuple[float, ...]:
    """``values`` with ``more`` seconds behind them, as many as deadlines rest on."""
    return (*values, *more)[-DEADLINE_WINDOW:]
