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
    """The largest shares of an outer step's weight, as exact fractions of 1."""

    each: Fraction
    """The share of one node, or twice an equal share if so few contribute that this is more."""
    newcomers: Fraction
    """The share of all nodes without voting weight together."""
    private: Fraction
    """The share of all nodes that train on private data together."""


def weights(plan: Plan, given: Mapping[str, Contribution], caps: Caps) -> dict[str, float]:
    """Return the fp32 weight of each node in the outer step, ascending by node: its share of the tokens within
    ``caps``.

    - One node is capped, so that the one with the most hardware does not decide alone.
    - Nodes without voting weight in ``plan`` are capped together. Identities are free; without this cap enough of them
      would have most of the weight.
    - Private contributions are capped together, because nobody can audit them.

    Weight above a cap goes to the other nodes by tokens. If there are none it is lost, as if they had contributed
    zeros; a run among private nodes alone sets their share to 1.
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
    """Return the proof (32 bytes) that ``node`` holds the base state in the round of ``seed``.

    It hashes one chunk that the seed draws for the node. ``read(i)`` returns chunk i of the outer state's blob, which
    has ``chunks`` chunks.
    """
    drawn = digest("base-chunk", seed, node.encode())
    return digest("base-proof", seed, node.encode(), bytes(read(int.from_bytes(drawn, "little") % chunks)))


def contribution_fault(rules: Rules, plan: Plan, member: Member, given: Contribution) -> str | None:
    """Return what is wrong with a contribution by the plan alone, or None. No node sets its own weight."""
    if given.base_root != plan.base_root:
        return "trained from another base state"
    if given.overlap_steps > min(rules.overlap_steps, given.inner_steps):
        return f"{given.overlap_steps} overlap steps claimed, {rules.overlap_steps} allowed"
    # Overlap steps were taken before the quota was known.
    if given.inner_steps > max(member.inner_steps, given.overlap_steps):
        return f"{given.inner_steps} inner steps claimed, {member.inner_steps} due"
    if given.tokens != given.inner_steps * rules.tokens_per_step:
        return "the tokens claimed do not match the inner steps claimed"
    if given.payload_bytes > rules.payload_bytes:
        return "the payload is larger than the codec can make it"
    if len(given.payout) not in (0, 20):
        return "its payout address does not have 20 bytes"
    return _private_fault(rules, given)


def _private_fault(rules: Rules, given: Contribution) -> str | None:
    """Return why a contribution cannot be private, or cannot be public, or None: without hashes it cannot be
    audited."""
    shown = given.data_digest, given.trace_root
    if not given.private:
        return "it has no data digest or no trace, and is not marked private" if WITHHELD in shown else None
    if not rules.private_share:
        return "this run takes no contributions from private data"
    return "it is private, and reveals a hash of its data" if {*shown} != {WITHHELD} else None
