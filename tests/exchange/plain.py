"""What the exchange's own tests add up with: nothing is capped, and nothing is clipped."""

from __future__ import annotations

from fractions import Fraction

from psyche.exchange.merge import Merge
from psyche.protocol.weights import Caps

MERGE = Merge(Caps(Fraction(1), Fraction(1), Fraction(1)), "mean")
