"""Weights under caps, computed as exact fractions and rounded once: the same fp32 values on every node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Cap:
    """An upper bound, ``most``, on the total weight of some nodes."""

    nodes: Set[str]
    most: Fraction


def capped_shares(parts: Mapping[str, int], caps: Sequence[Cap] = (), each: Fraction = Fraction(1)) -> dict[str, float]:
    """Compute :func:`exact_capped_shares` and round each once to the nearest fp32 value."""
    exact = exact_capped_shares(parts, caps, each)
    return {node: fp32_quotient(one.numerator, one.denominator) for node, one in exact.items()}


def exact_capped_shares(
    parts: Mapping[str, int], caps: Sequence[Cap] = (), each: Fraction = Fraction(1)
) -> dict[str, Fraction]:
    """Divide 1 among nodes in proportion to their parts, no share above ``each`` and all ``caps`` respected.

    Weight above a cap is redistributed to the other nodes by their parts, and is lost where there are none. This is
    progressive filling (Bertsekas and Gallager, Data Networks, 2nd edition, §6.5.2): all shares rise together, in
    proportion to the parts, and stop where a cap is reached. A cap on some nodes therefore never lowers the share of
    others, and the result does not depend on the order. Caps may overlap. Parts are positive; the result is in
    ascending order of node id.
    """
    filling = _Filling(parts, caps, each)
    while filling.rising:
        filling.rise()
    return {node: filling.found[node] for node in sorted(parts)}


class _Filling:
    """The state of :func:`exact_capped_shares`: which shares still rise, and the final ones of the others."""

    def __init__(self, parts: Mapping[str, int], caps: Sequence[Cap], each: Fraction) -> None:
        self._parts, self._each = parts, each
        self._caps = [*caps, Cap(frozenset(parts), Fraction(1))]
        self.rising = sorted(parts, key=lambda node: parts[node])
        """Nodes whose share still rises. The last one reaches ``each`` first."""
        self.found: dict[str, Fraction] = {}
        self._left = [cap.most for cap in self._caps]
        self._open = [sum(parts[node] for node in parts if node in cap.nodes) for cap in self._caps]

    def rise(self) -> None:
        """Raise the weight per part until a cap is reached, and fix the shares of the nodes under it."""
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
                self._fix(node, rate * part)
            else:
                still.append(node)
        self.rising = still

    def _fix(self, node: str, weight: Fraction) -> None:
        self.found[node] = weight
        for number, cap in enumerate(self._caps):
            if node in cap.nodes:
                self._left[number] -= weight
                self._open[number] -= self._parts[node]


def fp32_quotient(part: int, whole: int) -> float:
    """Round the exact quotient ``part / whole`` once to the nearest fp32 value, ties to even.

    Needs 0 ≤ part ≤ whole, whole > 0. Going through fp64 would round twice.
    """
    if part == 0:
        return 0.0
    exact = Fraction(part, whole)
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    if exact < Fraction(2) ** exponent:
        exponent -= 1
    ulp = Fraction(2) ** (max(exponent, -126) - 23)  # 23 fraction bits; −126 is the smallest normal exponent
    return float(round(exact / ulp) * ulp)  # Fraction rounds half to even
