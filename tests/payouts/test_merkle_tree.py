"""Claims in the layout of OpenZeppelin's StandardMerkleTree: against trees that it made, and an oracle of our own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from psyche.config.ethereum_address import address_bytes, keccak256
from psyche.payouts.merkle_tree import Claim, claim_tree, proves, weights_u16

ETHER = 10**18

# From the package's own README.
README = [("0x" + "1" * 40, 5 * ETHER), ("0x" + "2" * 40, 5 * ETHER // 2)]
README_TREE = [
    "d4dee0beab2d53f2cc83e567171bd2820e49898130a22622b10ead383e90bd77",
    "eb02c421cfa48976e66dfb29120745909ea3a0f843456c263cf8f1253483e283",
    "b92c48e9d7abe27fd8dfd6b5dfdbfb1c9a463f80c712b66f3a5180a090cccafc",
]

# A tree that the package dumped, of ten addresses with one ether each: address, and the place of its leaf.
TEN = {
    "0xFf000000000000000000000000000000000013DC": 15,
    "0xFF000000000000000000000000000000000013dd": 18,
    "0xFf000000000000000000000000000000000013dF": 12,
    "0xFf00000000000000000000000000000000001876": 13,
    "0xfF0000000000000000000000000000000000E879": 10,
    "0xFf0000000000000000000000000000000000e6f6": 17,
    "0xFF00000000000000000000000000000000017F7E": 11,
    "0xfF000000000000000000000000000000000017B3": 9,
    "0xFf000000000000000000000000000000000017b4": 16,
    "0xff000000000000000000000000000000000017B5": 14,
}
TEN_ROOT = "fa77c123512b8d1a96eb642e97ba5813924c91d903a8b414ba6c273e9cb186a8"
TEN_LAST = "10a9ae8051d64c7879d3373f417b6d0f543d2a6ea8136fa8a3d427ae14dd67d2"


def test_the_tree_of_the_readme() -> None:
    tree = claim_tree([Claim(address_bytes(address), amount) for address, amount in README])
    assert [one.hex() for one in tree.hashes] == README_TREE
    assert tree.places == (1, 2)
    assert [one.hex() for one in tree.proof(0)] == [README_TREE[2]]


def test_a_tree_of_ten() -> None:
    tree = claim_tree([Claim(address_bytes(address), ETHER) for address in TEN])
    assert tree.root.hex() == TEN_ROOT
    assert tree.places == tuple(TEN.values())
    assert tree.hashes[-1].hex() == TEN_LAST
    assert all(proves(tree.root, claim, tree.proof(number)) for number, claim in enumerate(tree.claims))


CLAIMS = st.lists(
    st.builds(Claim, st.binary(min_size=20, max_size=20), st.integers(1, 2**256 - 1)),
    min_size=1,
    max_size=20,
    unique_by=lambda claim: claim.address,
)


def oracle(claims: list[Claim]) -> bytes:
    """The root, from the top: what stands at a place is a leaf or the hash of what stands below it."""
    encoded = (f"{0:024x}{claim.address.hex()}{claim.amount:064x}" for claim in claims)
    leaves = sorted((keccak256(keccak256(bytes.fromhex(one))) for one in encoded), reverse=True)

    def at(place: int) -> bytes:
        below = len(leaves) - 1
        return leaves[place - below] if place >= below else keccak256(b"".join(sorted(map(at, children(place)))))

    def children(place: int) -> tuple[int, int]:
        return 2 * place + 1, 2 * place + 2

    return at(0)


@given(CLAIMS)
def test_every_claim_is_proven_and_the_root_is_the_oracles(claims: list[Claim]) -> None:
    tree = claim_tree(claims)
    assert tree.root == oracle(claims)
    for number, claim in enumerate(claims):
        proof = tree.proof(number)
        assert tree.hashes[tree.places[number]] == claim.leaf
        assert proves(tree.root, claim, proof)
        assert not proves(tree.root, Claim(claim.address, claim.amount - 1), proof)
        assert not proves(tree.root, claim, [*proof, bytes(32)])


@given(CLAIMS, st.randoms(use_true_random=False))
def test_the_order_of_claims_does_not_change_the_tree(claims: list[Claim], random: object) -> None:
    shuffled = list(claims)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert claim_tree(shuffled).hashes == claim_tree(claims).hashes


@given(st.lists(st.integers(0, 2**60), max_size=20))
def test_weights_are_to_the_largest_as_amounts_are(amounts: list[int]) -> None:
    weights, most = weights_u16(amounts), max(amounts, default=0)
    assert all(0 <= weight <= 65535 for weight in weights)
    assert all(2 * abs(weight * most - amount * 65535) <= most for weight, amount in zip(weights, amounts, strict=True))
    assert not most or 65535 in weights
