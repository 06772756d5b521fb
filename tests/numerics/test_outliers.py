"""Who stands out among payloads, and who does not."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from psyche.numerics.backends.selection import fastest_backend
from psyche.numerics.outliers import CHUNKS, Sample, Sketch, find_outliers, sketch

SIZE = 1 << 17
NODES = ("a", "b", "c", "d", "e", "f")
SAMPLE = Sample.drawn(b"secret", {0: SIZE})
EQUAL = dict.fromkeys(NODES, 8)


def honest(seed: int = 0, share: float = 0.6) -> dict[str, Tensor]:
    """Displacements that agree as those of honest nodes do: a common part, and one of each node's own."""
    make = torch.Generator().manual_seed(seed)
    common = torch.randn(SIZE, generator=make)
    return {node: share * common + torch.randn(SIZE, generator=make) for node in NODES}


def sketched(values: Mapping[str, Tensor], codec: str = "int8") -> dict[str, Sketch]:
    used = fastest_backend().codec(codec)
    found = {}
    for node, value in values.items():
        encoded = used.encode(value.clone(), torch.zeros_like(value), None, 0.0)
        found[node] = sketch(used, encoded, SAMPLE)
    return found


def signs(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {node: one.signs for node, one in sketched(values).items()}


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk2"])
def test_honest_payloads_do_not_stand_out(codec: str) -> None:
    earlier = [{node: one.signs for node, one in sketched(honest(seed), codec).items()} for seed in (1, 2)]
    assert find_outliers(sketched(honest(), codec), EQUAL, earlier) == {}


CHANGES = {
    "zero": (lambda mine, others: 0 * mine, {"direction", "norm"}),
    "flip": (lambda mine, others: -mine, {"direction"}),
    "noise": (lambda mine, others: torch.randn(SIZE) * mine.std(), {"direction"}),
    "tenfold": (lambda mine, others: 10 * mine, {"norm"}),
    "double": (lambda mine, others: 2 * mine, {"norm"}),
    "copy": (lambda mine, others: others["a"], {"copy"}),
    "copy, noise on top": (lambda mine, others: others["a"] + 0.3 * torch.randn(SIZE), {"copy"}),
}


@pytest.mark.parametrize("how", CHANGES)
def test_one_that_lies_stands_out(how: str) -> None:
    change, checks = CHANGES[how]
    torch.manual_seed(3)
    values = honest()
    values["f"] = change(values["f"], values)
    found = find_outliers(sketched(values), EQUAL, [])
    assert found.pop("f") in checks
    assert set(found) <= ({"a"} if "copy" in checks else set()), "of copies nobody can say which is the first"


def test_a_third_that_lies_stands_out() -> None:
    values = honest()
    for node in ("e", "f"):
        values[node] = -values[node]
    assert find_outliers(sketched(values), EQUAL, []) == dict.fromkeys(("e", "f"), "direction")


def test_an_earlier_round_over_again_stands_out() -> None:
    earlier, values = honest(1), honest()
    values["f"], values["e"] = earlier["f"], earlier["d"]
    found = find_outliers(sketched(values), EQUAL, [signs(earlier), signs(honest(2))])
    assert found == {"e": "copy", "f": "stale"}


def test_who_took_fewer_steps_has_a_smaller_norm() -> None:
    values = honest()
    values["f"] = values["f"] * 0.25**0.75
    assert find_outliers(sketched(values), EQUAL | {"f": 2}, []) == {}
    assert find_outliers(sketched(values), EQUAL, []) == {"f": "norm"}


def test_of_two_nobody_can_say_who_is_the_odd_one() -> None:
    values = {node: value for node, value in honest().items() if node in "ab"}
    values["b"] = -5 * values["b"]
    assert find_outliers(sketched(values), EQUAL, []) == {}
    values["b"] = values["a"]
    assert set(find_outliers(sketched(values), EQUAL, [])) == {"a", "b"}


def test_nothing_at_all() -> None:
    assert find_outliers({}, {}, []) == {}
    nothing = {node: torch.zeros(SIZE) for node in NODES}
    assert set(find_outliers(sketched(nothing), EQUAL, [])) <= set(NODES)


@given(secret=st.binary(min_size=1, max_size=8), counts=st.lists(st.integers(1, 64), min_size=1, max_size=9))
def test_a_sample_lies_within_a_slice_and_follows_from_the_secret(secret: bytes, counts: list[int]) -> None:
    sizes = {number: 4096 * count for number, count in enumerate(counts)}
    sample = Sample.drawn(secret, sizes)
    assert sample == Sample.drawn(secret, dict(reversed(sizes.items())))
    assert sample.count == sizes[sample.slice]
    assert len(sample.chunks) == min(CHUNKS, counts[sample.slice])
    assert sorted(set(sample.chunks)) == list(sample.chunks)
    assert max(sample.chunks) < counts[sample.slice]
