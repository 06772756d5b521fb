"""What contributions count for where some are capped: exact shares, whoever is in the majority."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche.numerics.shares import share, shares

TOKENS = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 2**40), min_size=1, max_size=12)


def total(found: dict[str, float], nodes: set[str]) -> Fraction:
    return sum((Fraction(found[node]) for node in nodes), Fraction(0))


@given(tokens=TOKENS, data=st.data(), most=st.fractions(0, 1))
def test_who_is_capped_never_has_more_than_the_cap_and_the_others_have_the_rest(
    tokens: dict[str, int], data: st.DataObject, most: Fraction
) -> None:
    capped = data.draw(st.sets(st.sampled_from(sorted(tokens))))
    found = shares(tokens, frozenset(capped), most)
    assert list(found) == sorted(tokens)
    rounding = Fraction(1, 2**23)
    assert total(found, capped) <= most * (1 + rounding)
    others = set(tokens) - capped
    if others:
        assert abs(total(found, set(found)) - 1) <= rounding, "no weight is lost where somebody may have it"
        assert total(found, others) >= (1 - most) * (1 - rounding)
    for group in (capped, others):
        for one in group:
            for other in group:
                exact = found[one] * tokens[other], found[other] * tokens[one]
                assert exact[0] == pytest.approx(exact[1], rel=2**-22), "within a group tokens decide"


@given(tokens=TOKENS)
def test_a_cap_that_nobody_reaches_changes_nothing(tokens: dict[str, int]) -> None:
    plain = shares(tokens)
    assert shares(tokens, frozenset(tokens), Fraction(1)) == plain
    assert plain == {node: share(tokens[node], sum(tokens.values())) for node in sorted(tokens)}


def test_a_private_majority_has_its_share_and_no_more() -> None:
    tokens = {"public": 100, "p1": 100, "p2": 100, "p3": 200}
    found = shares(tokens, frozenset({"p1", "p2", "p3"}), Fraction(1, 4))
    assert found == {"p1": 0.0625, "p2": 0.0625, "p3": 0.125, "public": 0.75}


def test_what_nobody_may_have_is_left_out() -> None:
    assert shares({"a": 3, "b": 1}, frozenset("ab"), Fraction(1, 4)) == {"a": 0.1875, "b": 0.0625}
