"""How much each accepted contribution counts in the outer step: computed by everyone, from the record alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from psyche.numerics.capped_shares import Cap, capped_shares
from psyche.protocol.messages import Contribution, Plan


@dataclass(frozen=True)
class Caps:
    """The most weight that somebody has, of 1: shares of the manifest, exact."""

    each: Fraction
    """One node; or twice an equal share, where so few contribute that this is more."""
    newcomers: Fraction
    """All nodes on probation, together."""
    private: Fraction
    """All that train on data of their own, together."""


def weights(plan: Plan, given: Mapping[str, Contribution], caps: Caps) -> dict[str, float]:
    """Of each node its fp32 weight, in ascending order of node id: its share of the tokens, as far as ``caps`` allow.

    - One node: who claims the most tokens, or has the most hardware, does not decide alone.
    - Whom ``plan`` gives no vote is on probation. Identities are free, so that without this cap anybody would have most
      of the weight with enough of them. (The electorate of the record would say nearly the same, and later than the
      reducers of a sharded round have to know it.)
    - What comes from private data cannot be audited (DESIGN §9): a majority of such contributions, honest or not, moves
      the model no further than that.

    What is taken from some goes to the others by tokens. Where there are no others it is nobody's, as if they had found
    that nothing is to be changed; a run among private nodes alone sets their share to 1.
    """
    voting = {member.node for member in plan.members if member.votes}
    newcomers = frozenset(given.keys() - voting)
    private = frozenset(node for node, one in given.items() if one.private)
    return capped_shares(
        {node: one.tokens for node, one in given.items()},
        [Cap(newcomers, caps.newcomers), Cap(private, caps.private)],
        min(Fraction(1), max(caps.each, Fraction(2, len(given)))),
    )
