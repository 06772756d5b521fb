"""Aggregation rules: their values, equal bits on all backends, and the dishonest weight that they tolerate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise, permutations
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from psyche.numerics.aggregate import (
    LEAST_SCALED_WEIGHT,
    AggregationRule,
    clipped_weights,
    payload_gradient,
    reduce_slice,
    weighted_median,
)
from psyche.numerics.backends.base import Backend, TorchBackend
from psyche.numerics.backends.cuda import CudaBackend
from psyche.numerics.backends.emulated import BACKWARDS, EmulatedLauncher
from psyche.numerics.backends.selection import available_backends
from psyche.numerics.capped_shares import capped_shares, fp32_quotient
from psyche.numerics.codecs.registry import codec
from tests.numerics.samples import CHUNK, LARGEST, TINIEST, bits

FAST = settings(max_examples=20, deadline=None)
RULES: tuple[AggregationRule, ...] = ("mean", "norm_clip")
every_rule = pytest.mark.parametrize("rule", RULES)


def encoded(values: Tensor, name: str = "fp32") -> bytes:
    return codec(name).encode(values, torch.zeros_like(values), None, 0.0)


def result(
    rule: AggregationRule,
    rows: Sequence[Tensor],
    tokens: Sequence[int] | None = None,
    backend: Backend | None = None,
    name: str = "fp32",
) -> Tensor:
    """The aggregate of ``rows``, each encoded by the codec ``name``."""
    nodes = [f"node {number:02}" for number in range(len(rows))]
    weights = capped_shares(dict(zip(nodes, tokens or [1] * len(rows), strict=True)))
    slices = {node: [encoded(row, name)] for node, row in zip(nodes, rows, strict=True)}
    out = torch.full_like(rows[0], float("nan"))  # previous contents must not matter
    payload_gradient((backend or TorchBackend()).codec(name), weights, slices, rule)(0, out)
    return out


def normal(count: int, seed: int, size: int = CHUNK) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(size, generator=generator)
    return [shared + torch.randn(size, generator=generator) for _ in range(count)]


def norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.double()))


# ------------------------------------------------------------------------- against float64 arithmetic


@every_rule
@pytest.mark.parametrize("count", [1, 4, 7, 8, 12])
def test_values_are_those_of_float64_arithmetic(rule: AggregationRule, count: int) -> None:
    rows = normal(count, seed=count)
    rows[0] = rows[0] * 7
    exact = torch.stack(rows).double().numpy()
    norms = np.linalg.norm(exact, axis=1)
    scale = np.minimum(1, np.sort(norms)[(count - 1) // 2] / norms) if rule == "norm_clip" else np.ones(count)
    np.testing.assert_allclose(result(rule, rows).numpy(), (scale / count) @ exact, rtol=2e-6, atol=2e-6)


@FAST
@given(tokens=st.lists(st.integers(1, 9), min_size=1, max_size=9), seed=st.integers(0, 999))
def test_the_median_counts_a_token_like_a_node_of_its_own(tokens: list[int], seed: int) -> None:
    squares = [norm(row) ** 2 for row in normal(len(tokens), seed)]
    in_order = accumulate(many for _, many in sorted(zip(squares, tokens, strict=True)))
    assume(all(2 * below != sum(tokens) for below in in_order))  # at exactly half, the rounding of weights decides
    repeated = [square for square, many in zip(squares, tokens, strict=True) for _ in range(many)]
    weights = [fp32_quotient(many, sum(tokens)) for many in tokens]
    equal = [fp32_quotient(1, sum(tokens))] * sum(tokens)
    assert weighted_median(squares, weights) == weighted_median(repeated, equal)


@every_rule
def test_equal_contributions_are_their_own_aggregate(rule: AggregationRule) -> None:
    row = normal(1, seed=5)[0]
    for count in (1, 2, 3, 6):
        np.testing.assert_allclose(result(rule, [row] * count).numpy(), row.numpy(), rtol=3e-7)


def test_zeros_are_clipped_to_zero_and_never_divide() -> None:
    for rule in RULES:
        assert not result(rule, [torch.zeros(CHUNK)] * 3).any()
    assert not result("norm_clip", [torch.zeros(CHUNK), torch.zeros(CHUNK), torch.ones(CHUNK)]).any()


@every_rule
def test_weights_that_sum_to_one_half_give_half_of_the_aggregate(rule: AggregationRule) -> None:
    slices = {name: [encoded(row)] for name, row in zip("abc", normal(3, seed=2), strict=True)}
    whole, half = torch.empty(CHUNK), torch.empty(CHUNK)
    payload_gradient(codec("fp32"), dict.fromkeys("abc", fp32_quotient(1, 3)), slices, rule)(0, whole)
    payload_gradient(codec("fp32"), dict.fromkeys("abc", fp32_quotient(1, 6)), slices, rule)(0, half)
    np.testing.assert_allclose(half.numpy(), 0.5 * whole.numpy(), rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("name", ["fp32", "int8", "int4", "topk2", "topk2e"])
@every_rule
def test_all_backends_compute_the_same_bits(emulator_library: Path, rule: AggregationRule, name: str) -> None:
    rows = [row * scale for row, scale in zip(normal(5, seed=9, size=2 * CHUNK), (1, 3, 0.1, 1e30, 1e-38), strict=True)]
    expected = result(rule, rows, [1, 2, 3, 4, 5], name=name)
    for backend in (*available_backends(), CudaBackend(EmulatedLauncher(emulator_library, BACKWARDS))):
        found = result(rule, rows, [1, 2, 3, 4, 5], backend, name)
        assert (bits(found) == bits(expected)).all(), backend.name


@every_rule
def test_the_number_of_threads_changes_nothing(rule: AggregationRule) -> None:
    rows = normal(3, seed=4, size=1 << 16)
    expected = bits(result(rule, rows))
    torch.set_num_threads(2)
    try:
        assert (bits(result(rule, rows)) == expected).all()
    finally:
        torch.set_num_threads(1)


@FAST
@given(order=st.sampled_from(list(permutations(range(4)))), rule=st.sampled_from(RULES))
def test_the_order_of_arrival_does_not_matter(order: tuple[int, ...], rule: AggregationRule) -> None:
    slices = {f"n{i}": [encoded(row, "int8")] for i, row in enumerate(normal(4, seed=1))}
    weights = capped_shares({f"n{i}": i + 1 for i in range(4)})

    def found(names: Sequence[str]) -> Tensor:
        out = torch.empty(CHUNK)
        arrived = {name: slices[name] for name in names}
        payload_gradient(codec("int8"), {name: weights[name] for name in names}, arrived, rule)(0, out)
        return out

    assert torch.equal(found([f"n{i}" for i in order]), found(sorted(slices)))


@every_rule
def test_a_reducer_with_one_slice_finds_what_a_node_with_all_slices_finds(rule: AggregationRule) -> None:
    used, rows = codec("int8"), [torch.cat(pair) for pair in pairwise(normal(4, seed=3))]
    halves = (slice(0, CHUNK), slice(CHUNK, 2 * CHUNK))
    slices = {f"n{i}": [encoded(row[half], "int8") for half in halves] for i, row in enumerate(rows)}
    weights = capped_shares(dict.fromkeys(slices, 1))
    everything = payload_gradient(used, weights, slices, rule)
    second: dict[str, Sequence[bytes]] = {node: [b"", parts[1]] for node, parts in slices.items()}
    one = payload_gradient(used, weights, second, rule)
    assert reduce_slice(one, used, 1, CHUNK) == reduce_slice(everything, used, 1, CHUNK)


# ------------------------------------------------------------------------------- dishonest contributions


def dishonest(size: int) -> st.SearchStrategy[Tensor]:
    """One row of anything that can be sent: huge or tiny values, or the largest and smallest of fp32."""
    sizes = st.sampled_from((LARGEST, -LARGEST, TINIEST, 0.0, 1e30, 1e10, -1.0, 100.0))

    def row(value: float, seed: int, mixed: bool) -> Tensor:
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), size) if mixed else np.ones(size)
        return torch.from_numpy((signs * value).astype(np.float32))

    return st.builds(row, sizes, st.integers(0, 99), st.booleans())


def honest_part(honest: Sequence[Tensor], count: int) -> Callable[[float], Tensor]:
    """What the honest of ``count`` nodes add to a norm_clip with a given bound."""

    def added(bound: float) -> Tensor:
        weight = fp32_quotient(1, count)
        return torch.stack([row.double() * weight * min(1.0, bound / norm(row)) for row in honest]).sum(0)

    return added


@pytest.mark.parametrize(("honest", "lying"), [(3, 1), (6, 2), (5, 1), (2, 1), (5, 4)])
@FAST
@given(data=st.data())
def test_a_dishonest_minority_moves_the_clipped_sum_no_further_than_honest_nodes_could(
    honest: int, lying: int, data: st.DataObject
) -> None:
    rows = normal(honest, data.draw(st.integers(0, 99)))
    mixed = data.draw(st.permutations([*rows, *(data.draw(dishonest(CHUNK)) for _ in range(lying))]))
    found = result("norm_clip", mixed)
    assert bool(torch.isfinite(found).all())
    bound = sorted(map(norm, mixed))[(len(mixed) - 1) // 2]
    shift = norm(found.double() - honest_part(rows, len(mixed))(bound))
    assert shift <= lying / len(mixed) * max(map(norm, rows)) * (1 + 1e-5)


@pytest.mark.parametrize(("rule", "honest", "lying"), [("mean", 7, 1), ("norm_clip", 4, 5)])
def test_beyond_the_breakdown_point_the_dishonest_move_it_anywhere(
    rule: AggregationRule, honest: int, lying: int
) -> None:
    rows = normal(honest, seed=8)
    found = [norm(result(rule, [*rows, *[torch.full((CHUNK,), size)] * lying])) for size in (1e6, 1e12, 1e18)]
    assert found[0] > 1e3 * max(map(norm, rows))
    assert found[1] / found[0] == pytest.approx(1e6, rel=0.01)
    assert found[2] / found[1] == pytest.approx(1e6, rel=0.01)


def test_many_new_identities_are_no_majority_where_their_weight_is_capped() -> None:
    """Twenty of them with a quarter of the weight against three honest nodes: weight counts, not nodes."""
    rows, false = normal(3, seed=6), [torch.full((CHUNK,), -1e20)] * 20
    names = [*(f"honest {i}" for i in range(3)), *(f"sybil {i:02}" for i in range(20))]
    weights = dict.fromkeys(names[:3], 0.25) | dict.fromkeys(names[3:], fp32_quotient(1, 80))
    slices = {name: [encoded(row)] for name, row in zip(names, (*rows, *false), strict=True)}
    out = torch.empty(CHUNK)
    payload_gradient(codec("fp32"), weights, slices, "norm_clip")(0, out)
    assert norm(out) <= 5 * max(map(norm, rows))


def test_a_clipped_weight_is_rounded_once() -> None:
    weights, squares = [fp32_quotient(1, 3)] * 3, [3.0, 7.0, 11.0]
    assert clipped_weights(weights, squares)[:2] == weights[:2]
    exact = weights[2] * sqrt(7.0 / 11.0)
    assert clipped_weights(weights, squares)[2] == float(np.float32(exact))
    assert Fraction(clipped_weights(weights, squares)[2]) != Fraction(exact)


def test_a_payload_too_large_for_a_normal_weight_is_left_out() -> None:
    weights = [fp32_quotient(1, 3)] * 3
    assert clipped_weights(weights, [1.0, 1.0, LARGEST**2])[2] == 0.0
    assert clipped_weights(weights, [1.0, 1.0, 1e70])[2] >= LEAST_SCALED_WEIGHT
    assert clipped_weights([2.0**-140, 0.5, 0.5], [1.0, 1.0, 1.0])[0] == 2.0**-140
