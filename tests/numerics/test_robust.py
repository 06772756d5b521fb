"""Robust aggregation: what it computes, that all backends compute the same bits, and how many liars it withstands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise, permutations
from math import fsum, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from psyche.numerics.aggregate import gathered, reduce_slice
from psyche.numerics.backends.base import Backend, TorchBackend
from psyche.numerics.backends.cuda import CudaBackend
from psyche.numerics.backends.emulated import BACKWARDS, EmulatedLauncher
from psyche.numerics.backends.selection import available_backends
from psyche.numerics.codecs.registry import codec
from psyche.numerics.robust import (
    ITERATIONS,
    LEAST,
    Aggregator,
    Kind,
    clipped,
    kept_weight,
    network,
    tree_sum,
    weighted_median,
)
from psyche.numerics.shares import share, shares
from tests.numerics.samples import CHUNK, LARGEST, TINIEST, bits

FAST = settings(max_examples=20, deadline=None)
KINDS: tuple[Kind, ...] = ("mean", "norm_clip", "trimmed_mean", "median", "centered_clip")
ROBUST = KINDS[1:]
TRIM = 0.25
Floats = NDArray[np.float64]


def result(
    kind: Kind, rows: Sequence[Tensor], tokens: Sequence[int] | None = None, backend: Backend | None = None, **how: str
) -> Tensor:
    """The aggregate of what ``rows`` decode to, by the codec ``how["codec"]``, fp32 if that is not given."""
    used = (backend or TorchBackend()).codec(how.get("codec", "fp32"))
    names = [f"node {number:02}" for number in range(len(rows))]
    counts = shares(dict(zip(names, tokens or [1] * len(rows), strict=True)))
    zeros = torch.zeros_like(rows[0])
    slices = {name: [codec(used.name).encode(row, zeros, None, 0.0)] for name, row in zip(names, rows, strict=True)}
    out = torch.full_like(rows[0], float("nan"))  # whatever was in it before is gone
    gathered(used, counts, slices, Aggregator(kind, TRIM))(0, out)
    return out


def normal(count: int, seed: int, size: int = CHUNK) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(size, generator=generator)
    return [shared + torch.randn(size, generator=generator) for _ in range(count)]


def norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.double()))


# ------------------------------------------------------------------------- against float64 arithmetic


def oracle(kind: Kind, rows: Floats, weights: Floats) -> Floats:
    """What the names mean, written down without regard to rounding; equal weights where values are compared."""
    norms = np.linalg.norm(rows, axis=1)
    bound = np.sort(norms)[(len(norms) - 1) // 2]
    cut = int(TRIM * len(rows))
    mean: Floats
    match kind:
        case "mean":
            mean = weights @ rows
        case "norm_clip":
            mean = (weights * np.minimum(1, bound / norms)) @ rows
        case "trimmed_mean":
            mean = np.sort(rows, axis=0)[cut : len(rows) - cut].mean(axis=0)
        case "median":
            mean = np.median(rows, axis=0)
        case "centered_clip":
            mean = np.median(rows, axis=0)
            for _ in range(ITERATIONS):
                away = rows - mean
                scale = np.minimum(1, bound / np.linalg.norm(away, axis=1))
                mean = mean + (weights * scale) @ away
    return mean


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 4, 7, 8, 12])
def test_values_are_those_of_float64_arithmetic(kind: Kind, count: int) -> None:
    if kind == "trimmed_mean" and count == 7:
        pytest.skip("a cut goes through a value: the next test")
    rows = normal(count, seed=count)
    rows[0] = rows[0] * 7
    expected = oracle(kind, torch.stack(rows).double().numpy(), np.full(count, 1 / count))
    np.testing.assert_allclose(result(kind, rows).numpy(), expected, rtol=2e-6, atol=2e-6)


def test_a_value_that_a_cut_goes_through_counts_in_part() -> None:
    """A quarter of 3 nodes is cut off either end: 1/4 of the lowest, all of the middle one, 1/4 of the highest."""
    rows = [torch.full((CHUNK,), value) for value in (1.0, 2.0, 12.0)]
    assert result("trimmed_mean", rows)[0] == pytest.approx((0.25 * 1 + 2 + 0.25 * 12) / 1.5, rel=1e-6)


@FAST
@given(tokens=st.lists(st.integers(1, 9), min_size=1, max_size=9), seed=st.integers(0, 999))
def test_tokens_count_as_if_each_were_a_node_of_its_own(tokens: list[int], seed: int) -> None:
    assume(sum(tokens) % 2)  # no two values are equally near the middle
    rows = normal(len(tokens), seed)
    repeated = [row for row, times in zip(rows, tokens, strict=True) for _ in range(times)]
    for kind in ("median", "trimmed_mean"):
        found = result(kind, rows, tokens)
        np.testing.assert_allclose(found.numpy(), result(kind, repeated).numpy(), rtol=1e-5, atol=1e-5)
    squares = [norm(row) ** 2 for row in rows]
    times = [square for square, many in zip(squares, tokens, strict=True) for _ in range(many)]
    weights = [share(many, sum(tokens)) for many in tokens]
    assert weighted_median(squares, weights) == weighted_median(times, [share(1, sum(tokens))] * sum(tokens))


@pytest.mark.parametrize("kind", ROBUST)
def test_equal_contributions_are_their_own_aggregate(kind: Kind) -> None:
    row = normal(1, seed=5)[0]
    for count in (1, 2, 3, 6):
        found = result(kind, [row] * count)
        np.testing.assert_allclose(found.numpy(), row.numpy(), rtol=3e-7)
        assert kind == "norm_clip" or torch.equal(found, row)


def test_zeros_are_clipped_to_nothing_and_divide_nothing() -> None:
    for kind in KINDS:
        assert not result(kind, [torch.zeros(CHUNK)] * 3).any()
    assert not result("norm_clip", [torch.zeros(CHUNK), torch.zeros(CHUNK), torch.ones(CHUNK)]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_weight_that_is_nobodys_moves_nothing(kind: Kind) -> None:
    rows = normal(3, seed=2)
    slices = {
        name: [codec("fp32").encode(row, torch.zeros(CHUNK), None, 0.0)] for name, row in zip("abc", rows, strict=True)
    }
    whole, half = torch.empty(CHUNK), torch.empty(CHUNK)
    gathered(codec("fp32"), dict.fromkeys("abc", share(1, 3)), slices, Aggregator(kind, TRIM))(0, whole)
    gathered(codec("fp32"), dict.fromkeys("abc", share(1, 6)), slices, Aggregator(kind, TRIM))(0, half)
    np.testing.assert_allclose(half.numpy(), 0.5 * whole.numpy(), rtol=1e-6, atol=1e-6)


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=40))
def test_what_rounding_does_to_weights_is_not_taken_for_weight_that_is_nobodys(tokens: list[int]) -> None:
    weights = [share(part, sum(tokens)) for part in tokens]
    assert kept_weight(weights) == 1.0
    assert kept_weight([weight / 2 for weight in weights]) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("count", range(1, 18))
def test_the_network_sorts(count: int) -> None:
    """Knuth's 0-1 principle: what sorts all zeros and ones sorts everything."""
    cases = np.arange(2**count) if count <= 12 else np.random.default_rng(count).integers(0, 2**count, 4096)
    columns = (cases[:, None] >> np.arange(count)) & 1
    for i, j in network(count):
        assert i < j
        columns[:, [i, j]] = np.sort(columns[:, [i, j]], axis=1)
    assert all((columns[:, i] <= columns[:, j]).all() for i, j in pairwise(range(count)))


@given(st.integers(0, 5000), st.integers(0, 99))
def test_the_sum_over_a_tree_is_a_sum(count: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(count)
    assert tree_sum(torch.from_numpy(values.copy())) == pytest.approx(fsum(values), abs=1e-9)


# ----------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("name", ["fp32", "int8", "int4", "topk2", "topk2e"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_backends_find_the_same_bits(emulator_library: Path, kind: Kind, name: str) -> None:
    if name.startswith("topk2") and kind not in ("mean", "norm_clip"):
        pytest.skip("sparse codecs are not compared value by value")
    rows = [row * scale for row, scale in zip(normal(5, seed=9, size=2 * CHUNK), (1, 3, 0.1, 1e30, 1e-38), strict=True)]
    expected = result(kind, rows, [1, 2, 3, 4, 5], codec=name)
    for backend in (*available_backends(), CudaBackend(EmulatedLauncher(emulator_library, BACKWARDS))):
        found = result(kind, rows, [1, 2, 3, 4, 5], backend, codec=name)
        assert (bits(found) == bits(expected)).all(), backend.name


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind: Kind) -> None:
    rows = normal(3, seed=4, size=1 << 16)
    expected = bits(result(kind, rows))
    torch.set_num_threads(2)
    try:
        assert (bits(result(kind, rows)) == expected).all()
    finally:
        torch.set_num_threads(1)


@FAST
@given(order=st.sampled_from(list(permutations(range(4)))), kind=st.sampled_from(KINDS))
def test_who_comes_first_does_not_matter(order: tuple[int, ...], kind: Kind) -> None:
    rows, used = normal(4, seed=1), codec("int8")
    slices = {f"n{i}": [used.encode(row, torch.zeros(CHUNK), None, 0.0)] for i, row in enumerate(rows)}
    counts = shares({f"n{i}": i + 1 for i in range(4)})

    def found(names: Sequence[str]) -> Tensor:
        out = torch.empty(CHUNK)
        arrived = {name: slices[name] for name in names}
        gathered(used, {name: counts[name] for name in names}, arrived, Aggregator(kind, TRIM))(0, out)
        return out

    assert torch.equal(found([f"n{i}" for i in order]), found(sorted(slices)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reducer_with_one_slice_finds_what_a_node_with_all_of_them_finds(kind: Kind) -> None:
    used, rows = codec("int8"), [torch.cat(pair) for pair in pairwise(normal(4, seed=3))]
    halves = (slice(0, CHUNK), slice(CHUNK, 2 * CHUNK))
    slices = {
        f"n{i}": [used.encode(row[half], torch.zeros(CHUNK), None, 0.0) for half in halves]
        for i, row in enumerate(rows)
    }
    counts = shares(dict.fromkeys(slices, 1))
    everything = gathered(used, counts, slices, Aggregator(kind, TRIM))
    second: dict[str, Sequence[bytes]] = {node: [b"", parts[1]] for node, parts in slices.items()}
    one = gathered(used, counts, second, Aggregator(kind, TRIM))
    assert reduce_slice(one, used, 1, CHUNK) == reduce_slice(everything, used, 1, CHUNK)


# ------------------------------------------------------------------------------------------- liars


def liars(size: int) -> st.SearchStrategy[Tensor]:
    """One row of anything that can be sent: of one size, huge or tiny, or of fp32's largest and least values."""
    sizes = st.sampled_from((LARGEST, -LARGEST, TINIEST, 0.0, 1e30, 1e10, -1.0, 100.0))

    def row(value: float, seed: int, mixed: bool) -> Tensor:
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), size) if mixed else np.ones(size)
        return torch.from_numpy((signs * value).astype(np.float32))

    return st.builds(row, sizes, st.integers(0, 99), st.booleans())


def within(found: Tensor, honest: Sequence[Tensor]) -> bool:
    """Whether every value is between the least and the largest of the honest ones."""
    rows = torch.stack(list(honest))
    return bool(((rows.amin(0) <= found) & (found <= rows.amax(0))).all())


def bounded(kind: Kind, found: Tensor, honest: Sequence[Tensor], lying: int, shift: Tensor) -> bool:
    """What the module promises while no more than it allows are lying."""
    largest = max(map(norm, honest)) * (1 + 1e-6)
    match kind:
        case "trimmed_mean" | "median":
            return within(found, honest)
        case "norm_clip":
            return norm(shift) <= lying / (lying + len(honest)) * largest * (1 + 1e-5)
        case _:
            corner = torch.stack(list(honest)).abs().amax(0)
            return norm(found) <= norm(corner) + ITERATIONS * largest


def without(honest: Sequence[Tensor], lying: int) -> Callable[[float], Tensor]:
    """What the honest alone add to a norm_clip whose bound is given."""

    def added(bound: float) -> Tensor:
        weight = share(1, lying + len(honest))
        return torch.stack([row.double() * weight * min(1.0, bound / norm(row)) for row in honest]).sum(0)

    return added


@pytest.mark.parametrize(("honest", "lying"), [(3, 1), (6, 2), (5, 1), (2, 1), (5, 4)])
@pytest.mark.parametrize("kind", ROBUST)
@FAST
@given(data=st.data())
def test_too_few_liars_move_nothing_beyond_what_honest_nodes_could(
    kind: Kind, honest: int, lying: int, data: st.DataObject
) -> None:
    if kind == "trimmed_mean" and lying > TRIM * (honest + lying):
        return
    rows = normal(honest, data.draw(st.integers(0, 99)))
    false = [data.draw(liars(CHUNK)) for _ in range(lying)]
    mixed = data.draw(st.permutations([*rows, *false]))
    found = result(kind, mixed)
    assert bool(torch.isfinite(found).all())
    bound = sorted(map(norm, mixed))[(len(mixed) - 1) // 2]
    shift = found.double() - without(rows, lying)(bound) if kind == "norm_clip" else found
    assert bounded(kind, found, rows, lying, shift)


@pytest.mark.parametrize(
    ("kind", "honest", "lying"),
    [("mean", 7, 1), ("norm_clip", 4, 5), ("trimmed_mean", 5, 3), ("median", 4, 5), ("centered_clip", 4, 5)],
)
def test_enough_liars_move_it_as_far_as_they_like(kind: Kind, honest: int, lying: int) -> None:
    """The breakdown points: any one; half of the weight; the share that is trimmed; half; half."""
    rows = normal(honest, seed=8)
    found = [norm(result(kind, [*rows, *[torch.full((CHUNK,), size)] * lying])) for size in (1e6, 1e12, 1e18)]
    assert found[0] > 1e3 * max(map(norm, rows))
    assert found[1] / found[0] == pytest.approx(1e6, rel=0.01)
    assert found[2] / found[1] == pytest.approx(1e6, rel=0.01)


@pytest.mark.parametrize("kind", ROBUST)
def test_many_new_identities_are_no_majority_where_their_weight_is_capped(kind: Kind) -> None:
    """Twenty of them, a quarter of the weight, three honest nodes: nodes are not counted, weight is."""
    rows, false = normal(3, seed=6), [torch.full((CHUNK,), -1e20)] * 20
    names = [*(f"honest {i}" for i in range(3)), *(f"sybil {i:02}" for i in range(20))]
    counts = dict.fromkeys(names[:3], 0.25) | dict.fromkeys(names[3:], share(1, 80))
    encoded = [codec("fp32").encode(row, torch.zeros(CHUNK), None, 0.0) for row in (*rows, *false)]
    out = torch.empty(CHUNK)
    gathered(codec("fp32"), counts, {n: [e] for n, e in zip(names, encoded, strict=True)}, Aggregator(kind, TRIM))(
        0, out
    )
    assert norm(out) <= 5 * max(map(norm, rows))


def test_a_clipped_weight_is_rounded_once() -> None:
    weights, squares = [share(1, 3)] * 3, [3.0, 7.0, 11.0]
    assert clipped(weights, squares)[:2] == weights[:2]
    exact = weights[2] * sqrt(7.0 / 11.0)
    assert clipped(weights, squares)[2] == float(np.float32(exact))
    assert Fraction(clipped(weights, squares)[2]) != Fraction(exact)


def test_what_is_too_large_to_be_bounded_by_a_normal_number_is_left_out() -> None:
    weights = [share(1, 3)] * 3
    assert clipped(weights, [1.0, 1.0, LARGEST**2])[2] == 0.0
    assert clipped(weights, [1.0, 1.0, 1e70])[2] >= LEAST
    assert clipped([2.0**-140, 0.5, 0.5], [1.0, 1.0, 1.0])[0] == 2.0**-140
