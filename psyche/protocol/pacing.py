"""Pacing: quotas of inner steps and deadlines, from measured speeds and durations.

The coordinator measures; no node declares its own speed. A member's speed in a round is its inner steps, without
overlap steps, divided by the seconds from the plan to its commitment. Claiming more overlap steps makes a node look
slower, and claiming fewer makes it owe more. Encoding and submitting count, because the commitments should arrive
together.

The fastest member owes H steps, the others as many as they can take in the same time. A node that commits at once to
steps it has not taken is found by audits; until then it can shorten rounds, but no further than ``EXCHANGES`` allows.

Deadlines are median + ``SPREAD`` · MAD of recent durations, within the manifest's bounds. Only nodes with voting weight
are measured for them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import median

from psyche.protocol.messages import Member, Plan, Record
from psyche.protocol.round_state import Round, Rules, Stage, State

SPEED_WINDOW = 5
"""Rounds over which a speed is the median. With it, four equal nodes whose speeds vary by 5 % (σ) all owe H in 97 % of
the rounds, eight in 89 %; with three rounds in 88 % and 67 % (2000 simulated rounds each)."""
ALIKE = 0.1
"""A node that is slower than the fastest by at most this share owes H as well, so that equal machines, whose speeds
vary by a few percent, take equal steps. The others wait that long for it."""
EXCHANGES = 2.0
"""A round trains for at least this many times its exchange, unless all owe H before that. So a node that lies about its
speed leaves the others two thirds of the time to train in. (A bound on the median speed would hold up every GPU among
laptops.)"""

Speeds = Mapping[str, tuple[float, ...]]
"""Inner steps per second of each node in its last ``SPEED_WINDOW`` rounds, the latest last."""


def quotas(
    most: int,
    members: Collection[str],
    voters: Collection[str],
    speeds: Speeds,
    last: Mapping[str, int],
    exchange: float = 0.0,
) -> dict[str, int]:
    """Return the inner steps that each of ``members`` owes, from 1 to ``most``, which is H.

    ``last`` are the inner steps of the last round, which count where nothing was measured yet, as under a new leader. A
    node of which nothing is known owes as much as the slowest. Only ``voters`` make others owe less, because identities
    are free. ``exchange`` is the duration of an exchange in seconds, 0 if it is not known.
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
    """Return the part of H for a relative ``speed``, rounded down: all would wait for one step too many."""
    return most if speed >= 1 - ALIKE else max(1, int(most * speed))


def measured(speeds: Speeds, current: Round, record: Record, here: Collection[str]) -> dict[str, tuple[float, ...]]:
    """Return ``speeds`` after ``record`` of the round ``current``, of its members and other nodes that are ``here``.

    Only accepted work counts. A node that fell short of its quota is measured by this round alone; one that is here and
    did not commit took less than its quota in all the time there was.
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
    if current.committed_at and lasted > 0:  # if no time passed, nobody was slow
        for node in due.keys() & set(here) - current.commitments.keys():
            kept[node] = (due[node] / lasted,)
    return kept


def done_in(record: Record) -> dict[str, int]:
    """Return the inner steps of each member of a round; for excluded members, their quota."""
    done = {one.node: one.contribution.inner_steps for one in record.accepted}
    return {member.node: done.get(member.node, member.inner_steps) for member in record.plan.members}


def planned(rules: Rules, state: State, seats: Sequence[str], weights: Mapping[str, int]) -> tuple[Member, ...]:
    """Return the members of the next plan, in the order of ``seats``, with their voting weights."""
    exchange = median(state.exchange_seconds or [0.0])
    owed = quotas(rules.inner_steps, seats, weights, state.speeds, state.last_steps, exchange)
    return tuple(Member(node, owed[node], weights.get(node, 0)) for node in seats)


def quota_fault(plan: Plan, rules: Rules) -> str | None:
    """Return why the manifest does not allow the quotas of ``plan``, or None. H is the largest quota."""
    for member in plan.members:
        if member.inner_steps > rules.inner_steps:
            return f"{member.node[-6:]} is given {member.inner_steps} inner steps, and H is {rules.inner_steps}"
    return None


DEADLINE_WINDOW = 64
"""Number of recent observations that a deadline is computed from."""
SPREAD = 5.0
"""MADs between the median and a deadline. For normally distributed times (MAD = 0.67 σ) this is 3.4 σ, which cuts off
one honest node in 2,700. Chosen, not measured."""


def adaptive(observed: Sequence[float], *, least: float, most: float, deviation: float = 0.0) -> float:
    """Return median + ``SPREAD`` × MAD of ``observed`` seconds, within [least, most]; ``most`` without observations.

    The MAD is at least ``deviation`` times the median.
    """
    recent = observed[-DEADLINE_WINDOW:]
    if not recent:
        return most
    middle = median(recent)
    mad = max(median(abs(value - middle) for value in recent), deviation * middle)
    return min(max(middle + SPREAD * mad, least), most)


LEAST_DEVIATION = 0.1
"""Least MAD of exchanges, relative to their median. A few exchanges on quiet lines agree to a tenth of a second, and do
not predict the next: at 20 Mbit/s up, 14.1 s followed 11.5 and 11.8 s, and half of the payloads were excluded."""


LEAST_DEVIATION_OF_TRAINING = 0.05
"""The same for training, which is more regular: after 30 rounds of 30.0 s there may be one of 31 s, in which a newcomer
fetches the state."""


def exchange_allowance(rules: Rules, seconds: Sequence[float]) -> float:
    """Return how long a stage of the exchange may take, given the ``seconds`` it took before."""
    least, most = rules.exchange_bounds
    return adaptive(seconds, least=least, most=most, deviation=LEAST_DEVIATION)


def training_allowance(rules: Rules, state: State) -> float:
    """Return how long members have until their commitments are due."""
    least, most = rules.round_bounds
    deviation = LEAST_DEVIATION_OF_TRAINING
    return adaptive(state.commit_seconds, least=least, most=most, deviation=deviation)


def observed(values: tuple[float, ...], *more: float) -> tuple[float, ...]:
    """Return ``values`` with ``more`` appended, at most ``DEADLINE_WINDOW`` of them."""
    return (*values, *more)[-DEADLINE_WINDOW:]
