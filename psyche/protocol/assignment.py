"""Which sequences a member trains on: O(1) to compute, O(1) to check, disjoint between members.

The run has one endless order of sequences, an epoch of all of them after the other. An epoch takes the shards in an
order keyed by (seed, epoch), and the sequences of a shard, all before those of the next, in an order keyed by (seed,
epoch, shard). So neighbours in the order are of one shard or two, and a member needs few of them at a time; that they
are no neighbours in the corpus is the store's business, which is shuffled when it is made.

A round takes the next stretch of positions and cuts it into one piece for each member, in an order drawn from the
round's seed, so that nobody can choose data by choosing a name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psyche.numerics.digest import digest
from psyche.protocol.messages import Plan

_FEISTEL_ROUNDS = 4
"""As many as Luby and Rackoff (1988) need for a strong pseudo-random permutation."""


def positions(plan: Plan, node: str, batch_size: int, overlap_steps: int) -> range:
    """The positions of one member's sequences in round ``plan``: ``batch_size`` for each step it may take.

    Step ``s`` of the member takes ``positions[s * batch_size : (s + 1) * batch_size]``. After its inner steps come
    ``overlap_steps`` that it may take while the round is on the wire; what it does not use is used by nobody. Raises
    ``KeyError`` for a node that is no member.
    """
    start = plan.position
    for member in sorted(plan.members, key=lambda m: digest("order", plan.seed, m.node.encode())):
        stop = start + (member.inner_steps + overlap_steps) * batch_size
        if member.node == node:
            return range(start, stop)
        start = stop
    raise KeyError(node)


def next_position(plan: Plan, batch_size: int, overlap_steps: int) -> int:
    """Where the round after ``plan`` starts, whoever of its members delivered."""
    return plan.position + sum(member.inner_steps + overlap_steps for member in plan.members) * batch_size


@dataclass(frozen=True)
class Shape:
    """How the sequences of a split lie in shards."""

    sequences: int
    """In all."""
    per_shard: int
    """In each shard but the last, which may have fewer."""

    @property
    def full_shards(self) -> int:
        return self.sequences // self.per_shard


def sequences(span: range, shape: Shape, seed: int) -> NDArray[np.int64]:
    """The sequence indices, in ``[0, shape.sequences)``, at the positions of ``span``."""
    result = np.empty(len(span), np.int64)
    done = 0
    for epoch, shard, rows in _stretches(span, shape, seed):
        count = min(shape.per_shard, shape.sequences - shard * shape.per_shard)
        turns, key = np.arange(rows.start, rows.stop, dtype=np.uint64), _key("sequence order", seed, epoch, shard)
        result[done : done + len(rows)] = shard * shape.per_shard + permute(turns, count, key)
        done += len(rows)
    return result


def shards(span: range, shape: Shape, seed: int) -> list[int]:
    """The numbers of the shards that hold the sequences of ``span``, each once, in the order they are needed."""
    return list(dict.fromkeys(shard for _, shard, _ in _stretches(span, shape, seed)))


def _stretches(span: range, shape: Shape, seed: int) -> Iterator[tuple[int, int, range]]:
    """``span`` cut where a shard ends: epoch, shard, and which of the shard's places in that epoch's order.

    A shard that is not full comes last in each epoch. Were it drawn like the others, all after it would be shifted.
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
    """π of each value: a permutation of ``[0, count)`` keyed by ``key`` (32 bytes), 0 < count ≤ 2^62.

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
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014). Wraps modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
