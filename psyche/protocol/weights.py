"""How much each accepted contribution counts in the outer step: computed by everyone, from the record alone."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from psyche.numerics.shares import shares
from psyche.protocol.messages import Contribution


def weights(given: Mapping[str, Contribution], private_share: float) -> dict[str, float]:
    """Of each node its fp32 weight, in ascending order of node id: its share of the tokens.

    What comes from private data cannot be audited (DESIGN §9), and so has at most ``private_share`` of the weight, all
    of it together: a majority of such contributions, honest or not, moves the model no further than that. Where there
    are no others, the rest of the weight is nobody's, as if the others had found that nothing is to be changed; a run
    among private nodes alone sets the share to 1.
    """
    tokens = {node: one.tokens for node, one in given.items()}
    private = frozenset(node for node, one in given.items() if one.private)
    return shares(tokens, private, Fraction(private_share))
