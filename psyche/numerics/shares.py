"""Weights as exact quotients, rounded once: the same fp32 values on every node (DESIGN §5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Cap:
    """That some nodes have no more than ``most`` of the weight together."""

    nodes: Set[str]
    most: Fraction


def shares(parts: Mapping[str, int], caps: Sequence[Cap] = (), each: Fraction = Fraction(1)) -> dict[str, float]:
    """:func:`exact_shares`, each rounded once to the nearest fp32 value."""
    return {node: share(exact.numerator, exact.denominator) for node, exact in exact_shares(parts, caps, each).items()}


def exact_shares(
    parts: Mapping[str, int], caps: Sequence[Cap] = (), each: Fraction = Fraction(1)
) -> dict[str, Fraction]:
    """Each node's share of 1 by its part, in ascending order of node id; none above ``each``, and all ``caps`` kept.

    What a cap takes goes to the others by their parts, and is nobody's where there are no others: all shares rise
    together, in proportion to the parts, and stop where a cap is reached (progressive filling, Bertsekas and Gallager,
    Data Networks, 2nd edition, §6.5.2). So nobody has less for it that others are capped, and no order matters. A node
    may be under several caps. Parts are positive.
    """
    filling = _Filling(parts, caps, each)
    while filling.rising:
        filling.rise()
    return {node: filling.found[node] for node in sorted(parts)}


class _Filling:
    """The state of :func:`exact_shares`: who still rises, and what all that no longer do have."""

    def __init__(self, parts: Mapping[str, int], caps: Sequence[Cap], each: Fraction) -> None:
        self._parts, self._each = parts, each
        self._caps = [*caps, Cap(frozenset(parts), Fraction(1))]
        self.rising = sorted(parts, key=lambda node: parts[node])
        """The one that reaches ``each`` first is last."""
        self.found: dict[str, Fraction] = {}
        self._left = [cap.most for cap in self._caps]
        self._open = [sum(parts[node] for node in parts if node in cap.nodes) for cap in self._caps]

    def rise(self) -> None:
        """To the next rate of weight for a part at which somebody is at a cap; who is rises no more."""
        largest = self._parts[self.rising[-1]]
        rate = min(
            self._each / largest,
            *(left / parts for left, parts in zip(self._left, self._open, strict=True) if parts),
        )
        full = [
            cap.nodes
            for cap, left, parts in zip(self._caps, self._left, self._open, strict=True)
            if left == rate * parts
        ]
        still = []
        for node in self.rising:
            part = self._parts[node]
            if rate * part == self._each or any(node in nodes for nodes in full):
                self._settle(node, rate * part)
            else:
                still.append(node)
        self.rising = still

    def _settle(self, node: str, weight: Fraction) -> None:
        self.found[node] = weight
        for number, cap in enumerate(self._caps):
            if node in cap.nodes:
                self._left[number] -= weight
                self._open[number] -= self._parts[node]


def share(part: int, whole: int) -> float:
    """``part / whole`` as the nearest fp32 value (ties to even), rounded once from the exact quotient.

    Needs 0 ≤ part ≤ whole, whole > 0. Rounding through fp64 would round twice.
    """
    if part == 0:
        return 0.0
    exact = Fraction(part, whole)
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    if exact < Fraction(2) ** exponent:
        exponent -= 1
    ulp = Fraction(2) ** (max(exponent, -126) - 23)  # 23 fraction bits; −126 is the least normal exponent
    return float(round(exact / ulp) * ulp)  # Fraction rounds half to even
