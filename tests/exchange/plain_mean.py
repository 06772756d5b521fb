"""What the exchange's own tests add up with: nothing is capped, and nothing is clipped."""

from __future__ import annotations

from fractions import Fraction

from psyche.exchange.aggregation import Aggregation
from psyche.protocol.contributions import Caps

PLAIN_MEAN = Aggregation(Caps(Fraction(1), Fraction(1), Fraction(1)), "mean")
