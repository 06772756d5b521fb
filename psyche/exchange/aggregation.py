"""From a round's payloads to its outer gradient: the weight of each contribution and the rule that combines them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from psyche.config import Run
from psyche.numerics.aggregate import AggregationRule, Gradient, PayloadSlices, payload_gradient
from psyche.numerics.codecs.base import Codec
from psyche.protocol.contributions import Caps, weights
from psyche.protocol.messages import Contribution, Plan

NEWCOMERS_SHARE = Fraction(1, 4)
"""Largest share of an outer step's weight that all nodes on probation have together. Keys are free, so any number of
new ones counts at most as much as one established node may (the default of ``aggregation.max_share``)."""


@dataclass(frozen=True)
class Aggregation:
    """The run's aggregation settings, the same on all nodes."""

    caps: Caps
    rule: AggregationRule

    @classmethod
    def of(cls, run: Run) -> Aggregation:
        """Return the settings in ``run.aggregation``. Shares are converted from fp64 exactly."""
        spec = run.aggregation
        caps = Caps(Fraction(spec.max_share), NEWCOMERS_SHARE, Fraction(run.private_share))
        return cls(caps, spec.kind)

    def gradient(
        self, codec: Codec, plan: Plan, contributions: Mapping[str, Contribution], payloads: Mapping[str, PayloadSlices]
    ) -> Gradient:
        """Return the outer gradient of ``plan``'s round over ``contributions``, computed slice by slice on demand.

        ``payloads`` holds, for each contribution, the slices that will be requested.
        """
        return payload_gradient(codec, weights(plan, contributions, self.caps), payloads, self.rule)
