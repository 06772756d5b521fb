"""Who adds up which part of a sharded round, and whose result is believed (DESIGN §7). Pure.

The slices of a round are dealt into as many *groups* as there are nodes on the *ring*: the members that committed in
time, in an order drawn from the round's seed. Group g is reduced by the k nodes on the ring from position g on, leaving
out those that are *out*: gone, silent, or without what they would need. Every node on it therefore reduces k groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice

from psyche.numerics.digest import digest
from psyche.protocol.messages import Plan
from psyche.protocol.state import Reduction, Rules


def reducer_order(seed: bytes, nodes: Iterable[str]) -> tuple[str, ...]:
    """``nodes`` in the order that the round's seed draws: nobody chooses what they reduce by choosing a name."""
    return tuple(sorted(nodes, key=lambda node: digest("ring", seed, node.encode())))


def slices_in(group: int, groups: int, slices: int) -> range:
    """The slices of one group. They are dealt round and round, so that groups differ by one slice at most."""
    return range(group, slices, groups)


@dataclass(frozen=True)
class ReducerAssignment:
    """Who reduces what."""

    reducer_order: tuple[str, ...]
    failed: frozenset[str]
    reassigned: tuple[int, ...]
    """Groups whose reducers contradict each other; each time one stands here, one more node reduces it."""
    reducers: int
    """k"""
    slices: int

    @property
    def groups(self) -> int:
        return min(len(self.reducer_order), self.slices)

    def reducers_of(self, group: int) -> tuple[str, ...]:
        """The nodes that reduce a group; fewer than k where no more are left."""
        around = (self.reducer_order[place] for place in chain(range(group, len(self.reducer_order)), range(group)))
        wanted = self.reducers + self.reassigned.count(group)
        return tuple(islice((node for node in around if node not in self.failed), wanted))

    def duties(self, node: str) -> tuple[int, ...]:
        """The groups that ``node`` reduces."""
        return tuple(group for group in range(self.groups) if node in self.reducers_of(group))

    def slices_of(self, group: int) -> range:
        """The slices of a group, which are the chunks of its result, in order."""
        return slices_in(group, self.groups, self.slices)


def assignment_of(rules: Rules, plan: Plan, reduction: Reduction) -> ReducerAssignment:
    """Return who reduces what in the round of ``plan`` now."""
    return ReducerAssignment(
        reduction.reducer_order, reduction.failed, reduction.reassigned, plan.reducers, rules.slices_in(plan.round)
    )


def verdict(reports: Mapping[str, bytes]) -> bytes | None:
    """The result that more than half of those who reported agree on, or None."""
    if not reports:
        return None
    (root, count), *_ = Counter(reports.values()).most_common(1)
    return root if 2 * count > len(reports) else None


def dissenters(reports: Mapping[str, bytes], root: bytes) -> frozenset[str]:
    """Who reported another result than the one that is believed."""
    return frozenset(node for node, found in reports.items() if found != root)


def reducer_order_fault(seed: bytes, order: tuple[str, ...], members: Collection[str]) -> str | None:
    """What is wrong with a ring that a coordinator shows, or None."""
    if not set(order) <= set(members) or order != reducer_order(seed, set(order)):
        return "the ring is not members of the round in the order of its seed"
    return None
