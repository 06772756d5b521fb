"""The mechanism: clipped to the bound, noise of the distribution and the size that the accountant is told of."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.federated import gaussian_mechanism as mechanism
from psyche.federated.gaussian_mechanism import gaussian, privatise, shrinkage

PARTS = [slice(0, 3000), slice(4096, 9000)]
SIZE = 12288
COUNT = sum(part.stop - part.start for part in PARTS)


def released(theta: torch.Tensor, local: torch.Tensor, *, clip: float, noise: float = 0.0) -> np.ndarray:
    """Δ̃ in PARTS, as fp64."""
    found = local.clone()
    privatise(theta, found, PARTS, clip=clip, noise_multiplier=noise)
    outside = torch.ones(SIZE, dtype=torch.bool)
    for part in PARTS:
        outside[part] = False
    torch.testing.assert_close(found[outside], local[outside], rtol=0, atol=0, equal_nan=True)  # it is not sent
    return np.concatenate([(theta[part].double() - found[part].double()).numpy() for part in PARTS])


def zeros() -> torch.Tensor:
    return torch.zeros(SIZE)


@settings(max_examples=30, deadline=None)
@given(clip=st.floats(1e-3, 1e3), size=st.floats(1e-6, 1e3), seed=st.integers(0, 99))
def test_all_parts_together_are_clipped_to_the_norm(clip: float, size: float, seed: int) -> None:
    torch.manual_seed(seed)
    delta = torch.randn(SIZE) * size
    found = released(zeros(), -delta, clip=clip)
    exact = np.concatenate([delta[part].double().numpy() for part in PARTS])
    norm = float(np.linalg.norm(exact))
    np.testing.assert_allclose(found, exact * min(1.0, clip / norm), rtol=1e-6)
    assert np.linalg.norm(found) <= clip * (1 + 1e-7), "but for fp32"


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_an_exploded_model_says_nothing(bad: float) -> None:
    local = zeros()
    local[:5000] = bad
    found = released(zeros(), local, clip=1.0)
    assert np.linalg.norm(found) <= 1 + 1e-6, "but for fp32"
    if not math.isfinite(bad):
        assert not found.any()


def test_noise_is_normal_of_the_size_the_accountant_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy import stats

    reproducible = SimpleNamespace(urandom=np.random.default_rng(1).bytes)
    monkeypatch.setattr(mechanism, "os", reproducible)
    values = gaussian(400_001)
    assert values.shape == (400_001,)
    assert stats.kstest(values, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(values[:200_000], values[200_000:400_000])[0, 1]) < 0.02
    found = released(zeros(), zeros(), clip=0.5, noise=3.0) / shrinkage(COUNT, 3.0)
    assert found.std() == pytest.approx(3.0 * 2 * 0.5, rel=0.05), "σ times the sensitivity, 2C: any Δ in place of any"


@settings(max_examples=20, deadline=None)
@given(noise=st.floats(1e-4, 1e2), seed=st.integers(0, 99))
def test_what_is_sent_is_no_further_from_the_truth_than_nothing_would_be(noise: float, seed: int) -> None:
    torch.manual_seed(seed)
    delta = torch.zeros(SIZE)
    for part in PARTS:
        delta[part] = torch.randn(part.stop - part.start)
    delta /= torch.linalg.vector_norm(delta)
    exact = np.concatenate([delta[part].double().numpy() for part in PARTS])
    found = released(zeros(), -delta, clip=1.0, noise=noise)
    expected = (2 * noise) ** 2 * COUNT * shrinkage(COUNT, noise)  # error² of the filter
    assert np.linalg.norm(found - exact) ** 2 == pytest.approx(expected, rel=0.15)


def test_noise_is_never_the_same_and_follows_no_seed() -> None:
    torch.manual_seed(1)
    first = gaussian(1000)
    torch.manual_seed(1)
    np.random.seed(1)
    assert not (gaussian(1000) == first).any()


def test_every_point_that_can_be_released_can_come_from_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signal and noise lie on one grid: no low bit of a sum tells what the noise was added to."""
    deviation = 0.7 * 2 * 1.5
    grid = 2.0 ** (math.floor(math.log2(deviation)) - mechanism.GRID_BITS)
    seen: list[np.ndarray] = []
    from_numpy = torch.from_numpy
    monkeypatch.setattr(mechanism.torch, "from_numpy", lambda array: (seen.append(array.copy()), from_numpy(array))[1])
    torch.manual_seed(0)
    released(zeros(), torch.randn(SIZE) * 1e-3, clip=1.5, noise=0.7)
    for array in seen:
        steps = array / shrinkage(COUNT, 0.7) / grid
        np.testing.assert_allclose(steps, np.rint(steps), rtol=1e-12)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    delta = torch.randn(SIZE)
    whole = released(zeros(), delta, clip=2.0)
    monkeypatch.setattr(mechanism, "BLOCK", 700)
    np.testing.assert_array_equal(whole, released(zeros(), delta, clip=2.0))
