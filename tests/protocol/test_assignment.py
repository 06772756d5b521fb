"""Data assignment: the keyed permutation is a bijection, and the ranges of members never overlap."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.numerics.digest import digest
from psyche.protocol.assignment import ShardLayout, next_position, permute, positions, sequences, shards
from psyche.protocol.messages import Member, Plan
from tests.protocol.one_leader import nodes

COUNTS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 97, 255, 256, 257, 1000, 1023, 1024, 1025, 4093, 65537]
LIMITS = settings(max_examples=60, deadline=None)


def plan_of(quotas: dict[str, int], seed: bytes = b"s" * 32, position: int = 0) -> Plan:
    members = tuple(Member(node, steps, 1) for node, steps in sorted(quotas.items()))
    return Plan(1, 1, b"p" * 32, b"b" * 32, seed, position, "gather", 0, members)


def permutation(count: int, seed: int, epoch: int) -> list[int]:
    return permute(np.arange(count, dtype=np.uint64), count, digest("test", bytes([seed % 256, epoch % 256]))).tolist()


@pytest.mark.parametrize("count", COUNTS)
def test_every_sequence_comes_once_in_an_epoch(count: int) -> None:
    for seed, epoch in ((0, 0), (7, 3), (2**63 - 1, 2**40)):
        assert sorted(permutation(count, seed, epoch)) == list(range(count))


def test_the_order_is_keyed_by_seed_and_epoch() -> None:
    orders = {tuple(permutation(257, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert tuple(range(257)) not in orders


def test_the_permutation_mixes_well() -> None:
    """Neighbours move far apart, and each sequence is equally likely early and late."""
    count = 4096
    order = np.array(permutation(count, 1, 0))
    assert np.abs(np.diff(order)).mean() == pytest.approx(count / 3, rel=0.1)
    assert order[: count // 2].mean() == pytest.approx(count / 2, rel=0.05)


@LIMITS
@given(count=st.integers(1, 2**62), value=st.data(), seed=st.integers(0, 2**63 - 1))
def test_large_counts_stay_in_range(count: int, value: st.DataObject, seed: int) -> None:
    at = value.draw(st.integers(0, count - 1))
    key = digest("test", seed.to_bytes(8, "little"))
    assert 0 <= int(permute(np.array([at], np.uint64), count, key)[0]) < count


LAYOUTS = st.builds(ShardLayout, st.integers(1, 300), st.integers(1, 400).map(lambda n: min(n, 300)))


@LIMITS
@given(
    layout=LAYOUTS,
    start=st.integers(0, 2000),
    length=st.integers(0, 700),
    cut=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_a_sub_range_yields_the_same_sequences(
    layout: ShardLayout, start: int, length: int, cut: float, seed: int
) -> None:
    whole = sequences(range(start, start + length), layout, seed)
    middle = start + int(length * cut)
    pieces = [sequences(range(start, middle), layout, seed), sequences(range(middle, start + length), layout, seed)]
    assert np.concatenate(pieces).tolist() == whole.tolist()
    one_by_one = [int(sequences(range(p, p + 1), layout, seed)[0]) for p in range(start, start + min(length, 30))]
    assert one_by_one == whole[:30].tolist()


@LIMITS
@given(layout=LAYOUTS, seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**20))
def test_an_epoch_has_every_sequence_once(layout: ShardLayout, seed: int, epoch: int) -> None:
    first = epoch * layout.sequences
    got = sequences(range(first, first + layout.sequences), layout, seed).tolist()
    assert sorted(got) == list(range(layout.sequences))


@LIMITS
@given(layout=LAYOUTS, start=st.integers(0, 2000), length=st.integers(0, 700), seed=st.integers(0, 9))
def test_the_shards_of_a_range_are_those_of_its_sequences_in_order(
    layout: ShardLayout, start: int, length: int, seed: int
) -> None:
    span = range(start, start + length)
    needed = [int(one) // layout.per_shard for one in sequences(span, layout, seed)]
    assert shards(span, layout, seed) == list(dict.fromkeys(needed))


@LIMITS
@given(layout=LAYOUTS, seed=st.integers(0, 9))
def test_an_epoch_reads_each_shard_completely_before_the_next(layout: ShardLayout, seed: int) -> None:
    needed = sequences(range(layout.sequences), layout, seed) // layout.per_shard
    assert np.count_nonzero(np.diff(needed)) == -(-layout.sequences // layout.per_shard) - 1


def test_a_range_no_longer_than_a_shard_spans_at_most_two() -> None:
    layout = ShardLayout(40 * 64, 64)
    assert max(len(shards(range(at, at + 64), layout, 3)) for at in range(6000)) == 2


def test_each_epoch_shuffles_the_shards_and_the_sequences_within_each() -> None:
    layout = ShardLayout(64 * 16, 64)
    epochs = [sequences(range(n * 1024, (n + 1) * 1024), layout, 5).reshape(16, 64) for n in range(2)]
    assert (epochs[0][:, 0] // 64).tolist() != (epochs[1][:, 0] // 64).tolist()
    within = {tuple((row % 64).tolist()) for epoch in epochs for row in epoch}
    assert len(within) == 32


@pytest.mark.parametrize("count", [1, 2, 7, 64, 100])
def test_epochs_follow_each_other(count: int) -> None:
    got = sequences(range(3 * count), ShardLayout(count, 40), 5).tolist()
    for epoch in range(3):
        assert sorted(got[epoch * count : (epoch + 1) * count]) == list(range(count))
    if count >= 64:
        assert got[:count] != got[count : 2 * count]


@LIMITS
@given(
    quotas=st.dictionaries(st.sampled_from(nodes(40)), st.integers(1, 50), min_size=1, max_size=12),
    batch=st.integers(1, 8),
    late=st.integers(0, 5),
    position=st.integers(0, 10**9),
    seed=st.binary(min_size=32, max_size=32),
)
def test_members_get_adjacent_ranges_without_overlap(
    quotas: dict[str, int], batch: int, late: int, position: int, seed: bytes
) -> None:
    plan = plan_of(quotas, seed, position)
    taken = [positions(plan, node, batch, late) for node in quotas]
    for node, span in zip(quotas, taken, strict=True):
        assert len(span) == (quotas[node] + late) * batch
    assert sorted(p for span in taken for p in (span.start, span.stop - 1))[0] == position
    everything = sorted(taken, key=lambda span: span.start)
    for one, other in pairwise(everything):
        assert one.stop == other.start
    assert everything[-1].stop == next_position(plan, batch, late)


def test_within_an_epoch_no_sequence_is_assigned_to_two_members() -> None:
    members = nodes(8)
    plan = plan_of(dict.fromkeys(members, 5), position=1000)
    got = [sequences(positions(plan, node, 4, 0), ShardLayout(4096, 100), 3).tolist() for node in members]
    assert len({one for piece in got for one in piece}) == 8 * 5 * 4


def test_the_order_of_members_follows_from_the_seed() -> None:
    """A node cannot choose its data by choosing a PeerID."""
    members = nodes(5)
    first = set()
    for seed in range(40):
        plan = plan_of(dict.fromkeys(members, 2), bytes([seed]) * 32)
        first.add(min(members, key=lambda node: positions(plan, node, 1, 0).start))
    assert first == set(members)


def test_a_node_outside_the_plan_has_no_positions() -> None:
    with pytest.raises(KeyError):
        positions(plan_of(dict.fromkeys(nodes(2), 1)), nodes(3)[2], 1, 0)
