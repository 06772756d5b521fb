"""Weights, sums and the outer step against arithmetic done by hand: every rounding is accounted for."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from psyche.numerics.aggregate import payload_gradient, reduce_slice, weighted_sum
from psyche.numerics.backends.base import TorchBackend
from psyche.numerics.backends.selection import fastest_backend
from psyche.numerics.capped_shares import capped_shares, fp32_quotient
from psyche.numerics.codecs.base import MalformedPayload
from psyche.numerics.codecs.registry import codec
from psyche.numerics.outer import OuterSettings, OuterState, outer_step
from tests.numerics.samples import CHUNK, bits, nearest_fp32, ranges

NUMBERS = st.integers(1, 2**62)

# Just above the middle between two fp32 values: fp64 rounds onto the middle, and from there the wrong way.
TWICE_ROUNDED = ((2**24 + 1) << 30, (1 << 55) - 1)


@settings(max_examples=300, deadline=None)
@given(numbers=st.tuples(NUMBERS, NUMBERS) | st.tuples(st.integers(1, 2**20), st.integers(1, 2**26)))
@example(numbers=TWICE_ROUNDED)
@example(numbers=(1, 2**62))
@example(numbers=(2**62 - 1, 2**62))
@example(numbers=(1, 3))
def test_share_is_the_exact_quotient_rounded_once(numbers: tuple[int, int]) -> None:
    part, whole = sorted(numbers)
    found = fp32_quotient(part, whole)
    assert found == float(np.float32(found)), "a weight must be an fp32 value"
    assert np.float32(found) == nearest_fp32(Fraction(part, whole))


def test_share_where_rounding_twice_gives_another_value() -> None:
    part, whole = TWICE_ROUNDED
    assert np.float32(part / whole) == np.float32(0.5)
    assert fp32_quotient(part, whole) == 0.5 + 2.0**-24


@pytest.mark.parametrize(("part", "whole", "expected"), [(0, 7, 0.0), (7, 7, 1.0), (1, 2, 0.5), (3, 4, 0.75)])
def test_share_where_nothing_is_rounded(part: int, whole: int, expected: float) -> None:
    assert fp32_quotient(part, whole) == expected


@pytest.mark.parametrize("members", [1, 2, 3, 7, 100])
def test_equal_parts_get_equal_shares_that_sum_to_one(members: int) -> None:
    shares = {fp32_quotient(1000, 1000 * members) for _ in range(members)}
    assert len(shares) == 1
    assert sum(Fraction(s) for s in shares) * members == pytest.approx(1, rel=2**-24)


@pytest.mark.parametrize("name", ["fp32", "int8"])
@settings(max_examples=15, deadline=None)
@given(values=st.lists(ranges(exponents=(-30, 30), max_chunks=1), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_aggregate_adds_in_the_order_given(name: str, values: list[Tensor], seed: int) -> None:
    used = codec(name)
    tokens = np.random.default_rng(seed).integers(1, 10**6, len(values)).tolist()
    weights = [fp32_quotient(t, sum(tokens)) for t in tokens]
    payloads = [used.encode(v, torch.zeros_like(v), None, 1.0) for v in values]
    out = torch.full((CHUNK,), float("nan"))  # whatever was in it before is gone
    weighted_sum(used, zip(weights, payloads, strict=True), out)
    expected = np.zeros(CHUNK, np.float32)
    for weight, payload in zip(weights, payloads, strict=True):
        decoded = torch.zeros(CHUNK)
        used.decode_add(payload, 1.0, decoded)
        expected = expected + np.float32(weight) * decoded.numpy()
    assert (out.numpy() == expected).all()


def test_the_order_of_a_sum_shows() -> None:
    used = codec("fp32")

    def total(*values: float) -> float:
        out = torch.empty(CHUNK)
        payloads = [used.encode(torch.full((CHUNK,), v), torch.zeros(CHUNK), None, 1.0) for v in values]
        weighted_sum(used, ((1.0, payload) for payload in payloads), out)
        return float(out[0])

    assert total(2.0**24, 1.0, -(2.0**24)) == 0.0
    assert total(2.0**24, -(2.0**24), 1.0) == 1.0


def test_aggregate_of_a_malformed_payload_raises() -> None:
    used = codec("int8")
    good = used.encode(torch.ones(CHUNK), torch.zeros(CHUNK), None, 1.0)
    with pytest.raises(MalformedPayload):
        weighted_sum(used, [(0.5, good), (0.5, good[:-1])], torch.empty(CHUNK))


PAIRS = [
    ("int8", "int8"),
    ("int4", "int8"),
    ("int2", "int4"),
    ("topk2", "topk2-512"),
    ("topk2e", "int4"),
    ("fp32", "fp32"),
]


@pytest.mark.parametrize(("name", "result"), PAIRS)
def test_a_reduced_slice_is_the_aggregate_encoded_once_by_every_backend(name: str, result: str) -> None:
    torch.manual_seed(5)
    count, tokens = 3 * CHUNK, {f"node {part}": part for part in (1, 2, 3, 4)}
    weights = [fp32_quotient(part, 10) for part in tokens.values()]
    values = [torch.randn(count) * 1e-3 for _ in weights]
    payloads = [codec(name).encode(v, torch.zeros(count), None, 0.0) for v in values]
    total = torch.empty(count)
    weighted_sum(codec(name), zip(weights, payloads, strict=True), total)
    expected = codec(result).encode(total, torch.zeros(count), None, 0.0)
    for backend in (TorchBackend(), fastest_backend()):
        used = backend.codec(name)
        slices = {node: [payload] for node, payload in zip(tokens, payloads, strict=True)}
        mean = payload_gradient(used, capped_shares(tokens), slices, "mean")
        assert reduce_slice(mean, backend.codec(result), 0, count) == expected
    codec(result).check(expected, count)


@pytest.mark.parametrize(("name", "result"), PAIRS)
def test_payloads_at_the_end_of_the_range_cannot_stop_who_reduces_them(name: str, result: str) -> None:
    """Three shares of 1/3 are more than 1 in fp32, so that the sum of three largest values overflows."""
    count, most = CHUNK, torch.finfo(torch.float32).max
    payload = codec(name).encode(torch.full((count,), most), torch.zeros(count), None, 0.0)
    total = torch.empty(count)

    def gradient(_: int, out: torch.Tensor) -> None:
        weighted_sum(codec(name), [(fp32_quotient(1, 3), payload)] * 3 + [(1.0, payload)], out)

    gradient(0, total)
    assert bool(torch.isinf(total).any())
    found = reduce_slice(gradient, codec(result), 0, count)
    decoded = torch.zeros(count)
    codec(result).decode_add(found, 1.0, decoded)
    assert bool(torch.isfinite(decoded).all())


# --------------------------------------------------------------------------------------- outer step


def stepped(theta: np.ndarray, m: np.ndarray, g: np.ndarray, lr: float, mu: float) -> tuple[np.ndarray, np.ndarray]:
    """m ← μm + g; θ ← θ − η(g + μm), one fp32 rounding for each operation, as the design writes it."""
    lr32, mu32 = np.float32(lr), np.float32(mu)
    m = mu32 * m + g
    return theta - lr32 * (g + mu32 * m), m


@settings(max_examples=40, deadline=None)
@given(
    values=st.tuples(*[ranges(exponents=(-140, 90), max_chunks=1)] * 3),
    lr=st.sampled_from([0.7, 1.0, 0.1, 3.3]),
    mu=st.sampled_from([0.0, 0.9, 0.99]),
)
def test_outer_step_to_the_bit(values: tuple[Tensor, Tensor, Tensor], lr: float, mu: float) -> None:
    theta, momentum, gradient = (v.clone() for v in values)
    wanted_theta, wanted_momentum = stepped(*(v.numpy().copy() for v in values), lr, mu)
    outer_step(theta, momentum, gradient, OuterSettings(lr, mu))
    assert (bits(theta) == wanted_theta.view(np.uint32)).all()
    assert (bits(momentum) == wanted_momentum.view(np.uint32)).all()
    assert torch.equal(gradient, values[2])


def test_outer_step_over_many_rounds_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    theta, momentum = torch.randn(CHUNK, generator=generator), torch.zeros(CHUNK)
    t, m = theta.numpy().copy(), momentum.numpy().copy()
    for _ in range(50):
        gradient = torch.randn(CHUNK, generator=generator) * 1e-2
        t, m = stepped(t, m, gradient.numpy(), 0.7, 0.9)
        outer_step(theta, momentum, gradient, OuterSettings(0.7, 0.9))
    assert (bits(theta) == t.view(np.uint32)).all()
    assert (bits(momentum) == m.view(np.uint32)).all()


def fused(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """a·b + c with one rounding."""
    return nearest_fp32(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


def test_outer_step_is_not_contracted_to_fused_multiply_adds() -> None:
    """Inputs for which contracting any of the three products changes a bit."""
    random = np.random.default_rng(5)
    lr, mu = np.float32(0.7), np.float32(0.9)
    theta, m, g = (random.standard_normal(CHUNK).astype(np.float32) for _ in range(3))
    plain_m = mu * m + g
    plain_theta = theta - lr * (g + mu * plain_m)
    fused_m = np.array([fused(mu, a, b) for a, b in zip(m, g, strict=True)])
    fused_look = np.array([fused(mu, a, b) for a, b in zip(plain_m, g, strict=True)])
    fused_theta = np.array([fused(-lr, a, b) for a, b in zip(g + mu * plain_m, theta, strict=True)])
    telling = (fused_m != plain_m) & (theta - lr * fused_look != plain_theta) & (fused_theta != plain_theta)
    assert telling.sum() > 10
    tensors = [torch.from_numpy(v.copy()) for v in (theta, m, g)]
    outer_step(*tensors, OuterSettings(0.7, 0.9))
    assert (tensors[0].numpy()[telling] == plain_theta[telling]).all()
    assert (tensors[1].numpy()[telling] == plain_m[telling]).all()


def test_subnormals_are_not_flushed() -> None:
    theta, momentum = torch.zeros(CHUNK), torch.full((CHUNK,), 2.0**-140)
    outer_step(theta, momentum, torch.full((CHUNK,), 2.0**-141), OuterSettings(1.0, 0.5))
    assert (momentum == 2.0**-140).all()
    assert (theta == -(2.0**-141 + 2.0**-141)).all()


# -------------------------------------------------------------------------------------- outer state


def test_the_state_root_changes_with_any_bit_of_theta_or_momentum() -> None:
    state = OuterState.initial(torch.linspace(-1, 1, CHUNK))
    roots = {state.index().root}
    for row, column in ((0, 0), (0, CHUNK - 1), (1, 0), (1, CHUNK - 1)):
        changed = state.clone()
        changed.tensor.view(torch.int32)[row, column] ^= 1
        roots.add(changed.index().root)
    assert len(roots) == 5
    assert state.clone().index() == state.index()


def test_the_initial_state_is_a_copy_without_momentum() -> None:
    theta = torch.ones(CHUNK)
    state = OuterState.initial(theta)
    theta.zero_()
    assert (state.theta == 1).all()
    assert not state.momentum.any()
    assert bytes(state.buffer) == np.array([1.0] * CHUNK + [0.0] * CHUNK, "<f4").tobytes()


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, 8, dtype=torch.float64), torch.zeros(3, 8), torch.zeros(16), torch.zeros(8, 2).T],
    ids=["fp64", "three rows", "flat", "not contiguous"],
)
def test_what_is_no_outer_state(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="outer state"):
        OuterState(wrong)


def test_a_setting_that_compiled_kernels_do_not_implement_is_left_to_pytorch() -> None:
    @dataclass(frozen=True)
    class Extended(OuterSettings):
        dampening: float = 0.0

    assert Extended(0.5, 0.8).kernel_arguments == (0.5, 0.8)
    assert Extended(0.5, 0.8, dampening=0.1).kernel_arguments is None
