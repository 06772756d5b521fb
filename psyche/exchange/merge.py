"""From a round's payloads to its outer gradient, as the manifest has it: who counts how much, and how all is added."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from psyche.config import Run
from psyche.numerics.aggregate import AggregationRule, Gradient, PayloadSlices, payload_gradient
from psyche.numerics.codecs.base import Codec
from psyche.protocol.messages import Contribution, Plan
from psyche.protocol.weights import Caps, weights

NEWCOMERS_SHARE = Fraction(1, 4)
"""Largest share of an outer step's weight that all nodes on probation have together. Keys are free, so any number of
new ones counts at most as much as one established node may (the default of ``aggregation.max_share``)."""


@dataclass(frozen=True)
class Merge:
    """The same on all nodes of a run."""

    caps: Caps
    rule: AggregationRule

    @classmethod
    def of(cls, run: Run) -> Merge:
        """What ``run.aggregation`` says. Its shares are taken as the fp64 values that they are."""
        spec = run.aggregation
        caps = Caps(Fraction(spec.max_share), NEWCOMERS_SHARE, Fraction(run.private_share))
        return cls(caps, spec.kind)

    def gradient(
        self, codec: Codec, plan: Plan, given: Mapping[str, Contribution], payloads: Mapping[str, PayloadSlices]
    ) -> Gradient:
        """The outer gradient of ``plan``'s round from all ``given`` contributions, slice by slice.

        ``payloads`` has, of each of them, the slices that will be asked for.
        """
        return payload_gradient(codec, weights(plan, given, self.caps), payloads, self.rule)
