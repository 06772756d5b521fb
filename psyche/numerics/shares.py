"""Weights as exact quotients, rounded once: the same fp32 values on every node (DESIGN §5)."""

from __future__ import annotations

from collections.abc import Mapping, Set
from fractions import Fraction


def shares(parts: Mapping[str, int], capped: Set[str] = frozenset(), most: Fraction = Fraction(1)) -> dict[str, float]:
    """Each node's :func:`share` of the sum of all ``parts``, in ascending order of node id.

    The nodes of ``capped`` get no more than ``most`` of it together, by their parts; what they may not have goes to the
    others by theirs, and is nobody's where there are no others. 0 ≤ ``most`` ≤ 1.
    """
    total, theirs = sum(parts.values()), sum(parts[node] for node in capped)
    if theirs <= most * total:
        return {node: share(parts[node], total) for node in sorted(parts)}
    found = {}
    for node in sorted(parts):
        together, of = (most, theirs) if node in capped else (1 - most, total - theirs)
        found[node] = share(together.numerator * parts[node], together.denominator * of)
    return found


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
