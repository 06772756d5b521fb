"""Rules for one contribution: its validity, its weight, and the proof that its author holds the base state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from typing_extensions import Buffer

from psyche.numerics.capped_shares import Cap, capped_shares
from psyche.numerics.digest import digest
from psyche.protocol.messages import WITHHELD, Contribution, Member, Plan
from psyche.protocol.round_state import Rules


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
    - What comes from private data cannot be audited: a majority of such contributions, honest or not, moves
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


def base_proof(seed: bytes, node: str, chunks: int, read: Callable[[int], Buffer]) -> bytes:
    """What ``node`` has to show in the round of ``seed``, 32 bytes. ``read(i)`` is chunk i of the outer state's blob,
    which has ``chunks`` of them."""
    drawn = digest("base-chunk", seed, node.encode())
    return digest("base-proof", seed, node.encode(), bytes(read(int.from_bytes(drawn, "little") % chunks)))


def contribution_fault(rules: Rules, plan: Plan, member: Member, given: Contribution) -> str | None:
    """What is wrong with a contribution by the plan alone, or None. Nobody sets their own weight."""
    if given.base_root != plan.base_root:
        return "trained from another base state"
    if given.overlap_steps > min(rules.overlap_steps, given.inner_steps):
        return f"{given.overlap_steps} late steps claimed where {rules.overlap_steps} are allowed"
    # Late steps were taken before anybody knew how few would be due.
    if given.inner_steps > max(member.inner_steps, given.overlap_steps):
        return f"{given.inner_steps} inner steps claimed where {member.inner_steps} were due"
    if given.tokens != given.inner_steps * rules.tokens_per_step:
        return "the tokens claimed are not those of the inner steps claimed"
    if given.payload_bytes > rules.payload_bytes:
        return "the payload is larger than the codec can make it"
    if len(given.payout) not in (0, 20):
        return "its payout address is not one of 20 bytes"
    return _private_fault(rules, given)


def _private_fault(rules: Rules, given: Contribution) -> str | None:
    """Why a contribution's label cannot be right, or None: who shows no hashes cannot be audited, and is capped."""
    shown = given.data_digest, given.trace_root
    if not given.private:
        return "it names no data or no trace, and is not labelled as private" if WITHHELD in shown else None
    if not rules.private_share:
        return "this run takes no contributions from private data"
    return "it is from private data, and shows more of them than it may" if {*shown} != {WITHHELD} else None
