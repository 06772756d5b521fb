"""The weight of each contribution in an outer step, with caps that hold against false claims and Sybil identities."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche.protocol.contributions import Caps, weights
from psyche.protocol.messages import Contribution, Member, Plan

CAPS = Caps(Fraction(1, 4), Fraction(1, 4), Fraction(1, 4))
ROUNDING = Fraction(1, 2**24)
NODES = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.tuples(st.integers(1, 10**9), st.booleans(), st.booleans()),
    min_size=1,
    max_size=12,
)
"""Tokens, whether the node has a vote, whether its data is private."""


def plan_of(votes: Mapping[str, bool]) -> Plan:
    members = tuple(Member(node, 1, int(votes[node])) for node in sorted(votes))
    return Plan(1, 1, bytes(32), bytes(32), bytes(32), 0, "gather", 0, members)


def contribution(tokens: int, private: bool = False) -> Contribution:
    return Contribution(*[bytes(32)] * 7, 1, 1, 0, tokens, private, b"", bytes(32))


def found(nodes: Mapping[str, tuple[int, bool, bool]], caps: Caps = CAPS) -> dict[str, float]:
    given = {node: contribution(tokens, private) for node, (tokens, _, private) in nodes.items()}
    return weights(plan_of({node: votes for node, (_, votes, _) in nodes.items()}), given, caps)


def together(counts: Mapping[str, float], nodes: set[str]) -> Fraction:
    return sum((Fraction(counts[node]) for node in nodes), Fraction(0))


@given(nodes=NODES)
def test_no_cap_is_exceeded(nodes: dict[str, tuple[int, bool, bool]]) -> None:
    counts = found(nodes)
    assert list(counts) == sorted(nodes)
    assert together(counts, set(nodes)) <= 1 + ROUNDING
    assert max(counts.values()) <= max(Fraction(1, 4), Fraction(2, len(nodes))) * (1 + ROUNDING)
    assert together(counts, {node for node in nodes if not nodes[node][1]}) <= Fraction(1, 4) * (1 + ROUNDING)
    assert together(counts, {node for node in nodes if nodes[node][2]}) <= Fraction(1, 4) * (1 + ROUNDING)
    assert dict(reversed(counts.items())) == found(dict(sorted(nodes.items(), reverse=True)))


@given(
    others=st.lists(st.integers(1, 10**6), min_size=1, max_size=8),
    tokens=st.integers(1, 10**6),
    pieces=st.integers(1, 30),
)
def test_a_node_that_splits_into_many_new_identities_stays_below_their_joint_cap(
    others: list[int], tokens: int, pieces: int
) -> None:
    """Whether they split the same work or each do as much again."""
    honest = {f"honest {number}": (given, True, False) for number, given in enumerate(others)}
    for each in (max(1, tokens // pieces), tokens):
        burst = {f"sybil {number}": (each, False, False) for number in range(pieces)}
        counts = found(honest | burst)
        assert together(counts, set(burst)) <= Fraction(1, 4) * (1 + ROUNDING)


@given(tokens=st.integers(1, 10**6), pieces=st.integers(1, 8))
def test_splitting_work_over_identities_with_votes_gains_no_weight(tokens: int, pieces: int) -> None:
    """Also after probation: the same total work has the same total weight."""
    honest = {f"honest {number}": (pieces * tokens, True, False) for number in range(8)}
    whole = found(honest | {"one": (pieces * tokens, True, False)})["one"]
    parts = {f"part {number}": (tokens, True, False) for number in range(pieces)}
    assert together(found(honest | parts), set(parts)) == pytest.approx(whole, rel=1e-6)


def test_a_few_members_are_not_capped() -> None:
    assert found({"a": (3, True, False), "b": (1, True, False)}) == {"a": 0.75, "b": 0.25}


def test_new_nodes_keep_their_cap_when_nobody_else_contributes() -> None:
    assert found({"a": (3, False, False), "b": (1, False, False)}) == {"a": 0.1875, "b": 0.0625}
