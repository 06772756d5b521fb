"""What contributions count for where some are capped: exact shares, whoever is in the majority."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from psyche.numerics.capped_shares import Cap, capped_shares, exact_capped_shares, fp32_quotient

TOKENS = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 2**40), min_size=1, max_size=12)
ONE = Fraction(1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, int], list[Cap], Fraction]:
    tokens = draw(TOKENS)
    sets = st.frozensets(st.sampled_from(sorted(tokens)))
    caps = draw(st.lists(st.builds(Cap, sets, st.fractions(0, 1)), max_size=3))
    return tokens, caps, draw(st.fractions(Fraction(1, 20), 1))


@given(case=cases())
def test_all_caps_are_kept_and_nobody_has_less_for_it_that_others_are_capped(
    case: tuple[dict[str, int], list[Cap], Fraction],
) -> None:
    tokens, caps, each = case
    found = exact_capped_shares(tokens, caps, each)
    assert list(found) == sorted(tokens)
    assert sum(found.values()) <= 1
    assert all(0 <= weight <= each for weight in found.values())
    for cap in caps:
        assert sum(found[node] for node in tokens if node in cap.nodes) <= cap.most
    whole = sum(tokens.values())
    for node in tokens:
        capped = found[node] == each or any(
            node in cap.nodes and sum(found[one] for one in tokens if one in cap.nodes) == cap.most for cap in caps
        )
        assert capped or found[node] >= Fraction(tokens[node], whole)


@given(case=cases())
def test_weight_is_nobodys_only_where_everybody_is_at_a_cap_and_else_follows_the_tokens(
    case: tuple[dict[str, int], list[Cap], Fraction],
) -> None:
    tokens, caps, each = case
    found = exact_capped_shares(tokens, caps, each)
    full = [cap.nodes for cap in caps if sum(found[node] for node in tokens if node in cap.nodes) == cap.most]
    free = [node for node in tokens if found[node] < each and not any(node in nodes for nodes in full)]
    if free:
        assert sum(found.values()) == 1
        rates = {found[node] / tokens[node] for node in free}
        assert len(rates) == 1, "of those whom nothing stops, tokens decide"
        assert all(found[node] <= rate * tokens[node] for node in tokens for rate in rates)


@given(case=cases(), seed=st.integers(0, 99))
def test_no_order_matters(case: tuple[dict[str, int], list[Cap], Fraction], seed: int) -> None:
    tokens, caps, each = case
    mixed = list(tokens.items())
    random.Random(seed).shuffle(mixed)
    assert capped_shares(dict(mixed), caps[::-1], each) == capped_shares(tokens, caps, each)


@given(case=cases())
def test_shares_are_the_exact_ones_rounded_once(case: tuple[dict[str, int], list[Cap], Fraction]) -> None:
    exact, found = exact_capped_shares(*case), capped_shares(*case)
    assert list(found) == list(exact)
    for node, weight in found.items():
        assert weight == float(np.float32(weight)) == fp32_quotient(exact[node].numerator, exact[node].denominator)


@given(tokens=TOKENS)
def test_caps_that_nobody_reaches_change_nothing(tokens: dict[str, int]) -> None:
    plain = capped_shares(tokens)
    assert capped_shares(tokens, [Cap(frozenset(tokens), ONE)]) == plain
    assert plain == {node: fp32_quotient(tokens[node], sum(tokens.values())) for node in sorted(tokens)}


def test_a_private_majority_has_its_share_and_no_more() -> None:
    tokens = {"public": 100, "p1": 100, "p2": 100, "p3": 200}
    found = capped_shares(tokens, [Cap(frozenset({"p1", "p2", "p3"}), Fraction(1, 4))])
    assert found == {"p1": 0.0625, "p2": 0.0625, "p3": 0.125, "public": 0.75}


def test_what_nobody_may_have_is_left_out() -> None:
    assert capped_shares({"a": 3, "b": 1}, [Cap(frozenset("ab"), Fraction(1, 4))]) == {"a": 0.1875, "b": 0.0625}
    assert capped_shares({"a": 3, "b": 1, "c": 1}, each=Fraction(1, 4)) == {"a": 0.25, "b": 0.25, "c": 0.25}


def test_what_a_node_may_not_have_goes_to_the_others() -> None:
    assert capped_shares({"large": 8, "a": 1, "b": 1}, each=Fraction(1, 2)) == {"a": 0.25, "b": 0.25, "large": 0.5}


def test_a_node_may_be_under_several_caps() -> None:
    """The narrowest counts: a has an eighth, and b what is left of the quarter that both have together."""
    caps = [Cap(frozenset("ab"), Fraction(1, 4)), Cap(frozenset("a"), Fraction(1, 8))]
    assert capped_shares({"a": 8, "b": 1, "c": 1, "d": 1}, caps) == {"a": 0.125, "b": 0.125, "c": 0.375, "d": 0.375}
