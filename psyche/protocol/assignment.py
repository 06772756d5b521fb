"""Assignment of data to members, and in a sharded round of groups of slices to reducers. Pure.

**Data.** The run has one endless order of sequences, epoch after epoch. An epoch takes the shards in an order keyed by
(seed, epoch), and within each shard its sequences in an order keyed by (seed, epoch, shard), so that a member needs few
shards at a time. A round takes the next stretch of positions and cuts it into one piece for each member, in an order
drawn from the round's seed: nobody chooses data by choosing a name. The position of a sequence takes O(1) to compute.

**Reducers.** The slices of a round are dealt into as many *groups* as there are reducers: the voters that committed in
time, in an order drawn from their commitments (the *reducer order*). Group g is reduced by the k reducers from place g
on, leaving out those that have *failed*: gone, silent, or without the payloads they need. So every reducer reduces k
groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from psyche.numerics.digest import digest
from psyche.protocol.messages import NO_COMMITMENT, Plan, Record
from psyche.protocol.round_state import Reduction, Rules

_FEISTEL_ROUNDS = 4
"""The number that Luby and Rackoff (1988) need for a strong pseudo-random permutation."""


def positions(plan: Plan, node: str, batch_size: int, overlap_steps: int) -> range:
    """Return the positions of one member's sequences in round ``plan``: ``batch_size`` for each step it may take.

    Step ``s`` takes ``positions[s * batch_size : (s + 1) * batch_size]``. ``overlap_steps`` more follow for steps that
    it may take during the exchange; unused ones are skipped. Raises ``KeyError`` for a node that is not a member.
    """
    start = plan.position
    for member in sorted(plan.members, key=lambda m: digest("order", plan.seed, m.node.encode())):
        stop = start + (member.inner_steps + overlap_steps) * batch_size
        if member.node == node:
            return range(start, stop)
        start = stop
    raise KeyError(node)


def next_position(plan: Plan, batch_size: int, overlap_steps: int) -> int:
    """Return the first data position of the round after ``plan``, whichever members contributed."""
    return plan.position + sum(member.inner_steps + overlap_steps for member in plan.members) * batch_size


@dataclass(frozen=True)
class ShardLayout:
    """How the sequences of a split are stored in shards."""

    sequences: int
    """Sequences in all shards."""
    per_shard: int
    """Sequences in each shard; the last may have fewer."""

    @property
    def full_shards(self) -> int:
        return self.sequences // self.per_shard


def sequences(span: range, shape: ShardLayout, seed: int) -> NDArray[np.int64]:
    """Return the sequence indices, in ``[0, shape.sequences)``, at the positions of ``span``."""
    result = np.empty(len(span), np.int64)
    done = 0
    for epoch, shard, rows in _stretches(span, shape, seed):
        count = min(shape.per_shard, shape.sequences - shard * shape.per_shard)
        turns, key = np.arange(rows.start, rows.stop, dtype=np.uint64), _key("sequence order", seed, epoch, shard)
        result[done : done + len(rows)] = shard * shape.per_shard + permute(turns, count, key)
        done += len(rows)
    return result


def shards(span: range, shape: ShardLayout, seed: int) -> list[int]:
    """Return the shards that hold the sequences of ``span``, each once, in the order in which they are needed."""
    return list(dict.fromkeys(shard for _, shard, _ in _stretches(span, shape, seed)))


def _stretches(span: range, shape: ShardLayout, seed: int) -> Iterator[tuple[int, int, range]]:
    """Cut ``span`` at the ends of shards. Yield epoch, shard, and the range of places in the shard's order.

    A shard that is not full comes last in each epoch: anywhere else it would shift the shards after it.
    """
    at = span.start
    while at < span.stop:
        epoch, offset = divmod(at, shape.sequences)
        turn, first = divmod(offset, shape.per_shard)
        shard = turn
        if turn < shape.full_shards:
            shard = int(permute(np.array([turn], np.uint64), shape.full_shards, _key("shard order", seed, epoch))[0])
        left = min(shape.per_shard, shape.sequences - turn * shape.per_shard) - first
        length = min(left, span.stop - at)
        yield epoch, shard, range(first, first + length)
        at += length


def _key(what: str, *numbers: int) -> bytes:
    return digest(what, *(number.to_bytes(8, "little") for number in numbers))


def permute(values: NDArray[np.uint64], count: int, key: bytes) -> NDArray[np.int64]:
    """Apply a permutation to each value: of ``[0, count)`` keyed by ``key`` (32 bytes), 0 < count ≤ 2^62.

    A balanced Feistel network on the next even number of bits, walked along its cycle until the value is in
    range again (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, §3: cycle walking). Less
    than 4 steps on average, since the domain is less than 4 × count.
    """
    half = np.uint64(max(1, (max(count - 1, 1).bit_length() + 1) // 2))
    keys = np.frombuffer(key, "<u8", _FEISTEL_ROUNDS)
    out = values.copy()
    walking = np.ones(len(out), bool)
    while walking.any():
        out[walking] = _feistel(out[walking], half, keys)
        walking = out >= np.uint64(count)
    return out.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finaliser of SplitMix64 (Steele, Lea and Flood, 2014). Wraps modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def reducer_order(plan: Plan, commitments: Mapping[str, bytes]) -> tuple[str, ...]:
    """Return the reducers of a round in their drawn order, given all commitments that were in when they closed.

    Only voters reduce, and of those only nodes with half of the average weight or more: a weight that is split over
    many names gets at most twice its share of the places. The order is drawn from the commitments, each of which has a
    salt that only its author knows before; so nobody can make a key that fits a place.
    """
    weights = {node: weight for node, weight in plan.weights.items() if node in commitments}
    able = [node for node in sorted(weights) if 2 * len(weights) * weights[node] >= sum(weights.values())]
    drawn = digest("reducers", plan.seed, *(commitments[node] for node in sorted(weights)))
    return tuple(sorted(able, key=lambda node: digest("reducer", drawn, node.encode())))


def slices_in(group: int, groups: int, slices: int) -> range:
    """Return the slices of one group, dealt in turn, so that groups differ by one slice at most."""
    return range(group, slices, groups)


@dataclass(frozen=True)
class ReducerAssignment:
    """Which nodes reduce which groups."""

    reducer_order: tuple[str, ...]
    failed: frozenset[str]
    reassigned: tuple[int, ...]
    """Groups whose reducers contradict each other; for each entry one more node reduces the group."""
    reducers: int
    """k"""
    slices: int

    @property
    def groups(self) -> int:
        return min(len(self.reducer_order), self.slices)

    def reducers_of(self, group: int) -> tuple[str, ...]:
        """Return the nodes that reduce a group; fewer than k if no more are left."""
        around = (self.reducer_order[place] for place in chain(range(group, len(self.reducer_order)), range(group)))
        wanted = self.reducers + self.reassigned.count(group)
        return tuple(islice((node for node in around if node not in self.failed), wanted))

    def duties(self, node: str) -> tuple[int, ...]:
        """Return the groups that ``node`` reduces."""
        return tuple(group for group in range(self.groups) if node in self.reducers_of(group))

    def slices_of(self, group: int) -> range:
        """Return the slices of a group, which are the chunks of its result, in order."""
        return slices_in(group, self.groups, self.slices)


def assignment_of(rules: Rules, plan: Plan, reduction: Reduction) -> ReducerAssignment:
    """Return who reduces what in the round of ``plan`` now."""
    return ReducerAssignment(
        reduction.reducer_order, reduction.failed, reduction.reassigned, plan.reducers, rules.slices_in(plan.round)
    )


def verdict(reports: Mapping[str, bytes]) -> bytes | None:
    """Return the result that more than half of the reporting reducers agree on, or None."""
    if not reports:
        return None
    (root, count), *_ = Counter(reports.values()).most_common(1)
    return root if 2 * count > len(reports) else None


def dissenters(reports: Mapping[str, bytes], root: bytes) -> frozenset[str]:
    """Return the reducers that reported another result than the accepted one."""
    return frozenset(node for node, found in reports.items() if found != root)


def reducer_order_fault(record: Record) -> str | None:
    """Return what is wrong with the commitments or the reducer order of a sharded record, or None."""
    voters = list(record.plan.weights)
    if len(record.commitments) != len(voters):
        return "there is not one commitment for each voter in the plan"
    commitments = {node: one for node, one in zip(voters, record.commitments, strict=True) if one != NO_COMMITMENT}
    if record.reducer_order != reducer_order(record.plan, commitments):
        return "the reducers are not the voters that committed, in the order drawn from their commitments"
    return None
