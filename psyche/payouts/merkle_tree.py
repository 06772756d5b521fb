"""Final credits as a Merkle tree that contracts on Ethereum can check claims against, one by one.

The layout is that of OpenZeppelin's StandardMerkleTree, which distributors already read (``MerkleProof.verify``). A
leaf is keccak256(keccak256(abi.encode(address, uint256))), so that no inner node is ever taken for a leaf. Leaves are
sorted, and a node hashes its two children, the lesser first, so that a proof needs no left and right. The tree is a
list: its root comes first, the children of i are 2i + 1 and 2i + 2, and the sorted leaves stand at its end, the least
last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psyche.config.ethereum_address import keccak256

FORMAT = "standard-v1"
LEAF_ENCODING = ("address", "uint256")


@dataclass(frozen=True)
class Claim:
    """What an address is to be paid, in credits."""

    address: bytes
    amount: int

    @property
    def leaf(self) -> bytes:
        return keccak256(keccak256(self.address.rjust(32, b"\0") + self.amount.to_bytes(32, "big")))


@dataclass(frozen=True)
class ClaimTree:
    """All claims, and where the leaf of each stands in the list of hashes."""

    claims: tuple[Claim, ...]
    hashes: tuple[bytes, ...]
    places: tuple[int, ...]

    @property
    def root(self) -> bytes:
        return self.hashes[0]

    def proof(self, number: int) -> list[bytes]:
        """The hashes that lead from claim ``number`` to the root."""
        at, found = self.places[number], []
        while at:
            found.append(self.hashes[at + 1 if at % 2 else at - 1])
            at = (at - 1) // 2
        return found


def claim_tree(claims: Sequence[Claim]) -> ClaimTree:
    """The tree over ``claims``, of which there is at least one, with one address each."""
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
    """Whether ``proof`` leads from ``claim`` to ``root``: what a distributor asks before it pays."""
    found = claim.leaf
    for sibling in proof:
        found = _pair(found, sibling)
    return found == root


def _pair(one: bytes, other: bytes) -> bytes:
    return keccak256(min(one, other) + max(one, other))


U16 = 65535


def weights_u16(amounts: Sequence[int]) -> list[int]:
    """``amounts`` as Bittensor's validators set weights: u16, the largest 65535, rounded to the nearest."""
    most = max(amounts, default=0)
    return [(2 * amount * U16 + most) // (2 * most) if most else 0 for amount in amounts]
