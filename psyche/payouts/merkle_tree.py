"""A Merkle tree of final credits, against which an Ethereum contract can check single claims.

The layout is that of OpenZeppelin's StandardMerkleTree, for ``MerkleProof.verify``. A leaf is
keccak256(keccak256(abi.encode(address, uint256))), so that no inner node can pass for a leaf. Leaves are sorted, and a
node hashes its two children, the smaller first, so that proofs need no positions. The tree is a list: the root is
first, the children of i are 2i + 1 and 2i + 2, and the leaves are at the end in descending order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psyche.config.ethereum_address import keccak256

FORMAT = "standard-v1"
LEAF_ENCODING = ("address", "uint256")


@dataclass(frozen=True)
class Claim:
    """The credits to pay to an address."""

    address: bytes
    amount: int

    @property
    def leaf(self) -> bytes:
        return keccak256(keccak256(self.address.rjust(32, b"\0") + self.amount.to_bytes(32, "big")))


@dataclass(frozen=True)
class ClaimTree:
    """All claims, the list of hashes, and the position of each claim's leaf in it."""

    claims: tuple[Claim, ...]
    hashes: tuple[bytes, ...]
    places: tuple[int, ...]

    @property
    def root(self) -> bytes:
        return self.hashes[0]

    def proof(self, number: int) -> list[bytes]:
        """Return the sibling hashes from claim ``number`` up to the root."""
        at, found = self.places[number], []
        while at:
            found.append(self.hashes[at + 1 if at % 2 else at - 1])
            at = (at - 1) // 2
        return found


def claim_tree(claims: Sequence[Claim]) -> ClaimTree:
    """Build the tree over at least one claim, with distinct addresses."""
    leaves = [claim.leaf for claim in claims]
    order = sorted(range(len(leaves)), key=leaves.__getitem__)
    last = 2 * len(leaves) - 2
    hashes, places = [b""] * (last + 1), [0] * len(leaves)
    for rank, number in enumerate(order):
        hashes[last - rank], places[number] = leaves[number], last - rank
    for at in range(last - len(leaves), -1, -1):
        hashes[at] = _pair(hashes[2 * at + 1], hashes[2 * at + 2])
    return ClaimTree(tuple(claims), tuple(hashes), tuple(places))


def proves(root: bytes, claim: Claim, proof: Sequence[bytes]) -> bool:
    """Return whether ``proof`` leads from ``claim`` to ``root``, as a distributor contract checks before it pays."""
    found = claim.leaf
    for sibling in proof:
        found = _pair(found, sibling)
    return found == root


def _pair(one: bytes, other: bytes) -> bytes:
    return keccak256(min(one, other) + max(one, other))


U16 = 65535


def weights_u16(amounts: Sequence[int]) -> list[int]:
    """Scale ``amounts`` to u16 weights as Bittensor's validators set them: the largest is 65535, rounded to nearest."""
    most = max(amounts, default=0)
    return [(2 * amount * U16 + most) // (2 * most) if most else 0 for amount in amounts]
