"""Write final credits by payout address to files that a third party can pay from, and look up single claims."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from psyche.config.ethereum_address import ADDRESS_BYTES, checksummed
from psyche.errors import PsycheError
from psyche.ledger.verify import Summary
from psyche.payouts.merkle_tree import FORMAT, LEAF_ENCODING, Claim, claim_tree, proves, weights_u16
from psyche.protocol.credits import Account

MAX_CLAIMS_FILE = 256 << 20
"""Maximum size of a claims file that is read: about a million claims."""


@dataclass(frozen=True)
class Payable:
    """Final credit by payout address."""

    claims: tuple[Claim, ...]
    """One claim per address, ascending; an address that several nodes named has their sum."""
    nodes: dict[bytes, list[str]]
    """The nodes that named each address."""
    unclaimed: dict[str, int]
    """Final credit of nodes that named no address."""


def require_whole(summary: Summary, path: Path) -> None:
    """Raise :class:`PsycheError` if rounds are missing: different ledgers would give different claims."""
    if summary.missing:
        count = sum(map(len, summary.missing))
        raise PsycheError(
            f"{path} lacks {count:,} rounds, so the credit earned in them is unknown: use the ledger of a node or "
            "coordinator that was present from the start"
        )
    if not any(account.final for account in summary.credits.accounts.values()):
        raise PsycheError(f"no credit in {path} is final yet: `psyche ledger credits` shows what is pending")


def payable(accounts: Iterable[Account]) -> Payable:
    """Group the final credit of all accounts by payout address."""
    amounts: dict[bytes, int] = {}
    nodes: dict[bytes, list[str]] = {}
    unclaimed: dict[str, int] = {}
    for account in sorted(accounts, key=lambda one: one.node):
        if not account.final:
            continue
        if not account.payout:
            unclaimed[account.node] = account.final
            continue
        amounts[account.payout] = amounts.get(account.payout, 0) + account.final
        nodes.setdefault(account.payout, []).append(account.node)
    return Payable(tuple(Claim(address, amounts[address]) for address in sorted(amounts)), nodes, unclaimed)


def claims_file(found: Payable, run_id: bytes, round_number: int) -> bytes:
    """Encode the tree in the dump format of StandardMerkleTree, which ignores the added key ``psyche``.

    That key holds each claim's proof and the unclaimed credit. Raises :class:`PsycheError` if there is no claim.
    """
    if not found.claims:
        raise PsycheError("no node with final credit has named a payout address (`psyche join --payout 0x…`)")
    tree = claim_tree(found.claims)
    values = [
        {"value": [checksummed(claim.address), str(claim.amount)], "treeIndex": place}
        for claim, place in zip(tree.claims, tree.places, strict=True)
    ]
    claims = [
        {
            "address": checksummed(claim.address),
            "amount": str(claim.amount),
            "nodes": found.nodes[claim.address],
            "proof": [_hex(one) for one in tree.proof(number)],
        }
        for number, claim in enumerate(tree.claims)
    ]
    unclaimed = {node: str(amount) for node, amount in found.unclaimed.items()}
    return _json(
        {
            "format": FORMAT,
            "leafEncoding": list(LEAF_ENCODING),
            "tree": [_hex(one) for one in tree.hashes],
            "values": values,
            "psyche": {
                "run_id": run_id.hex(),
                "round": round_number,
                "root": _hex(tree.root),
                "claims": claims,
                "unclaimed": unclaimed,
            },
        }
    )


def weights_file(accounts: Iterable[Account], run_id: bytes, round_number: int) -> bytes:
    """Encode final credit by node, ascending, as a u16 weight vector. The submitter has to add the uids."""
    paid = sorted((account.node, account.final) for account in accounts if account.final)
    weights = weights_u16([amount for _, amount in paid])
    nodes = [{"node": node, "weight": weight} for (node, _), weight in zip(paid, weights, strict=True)]
    return _json({"format": "weights-u16", "run_id": run_id.hex(), "round": round_number, "weights": nodes})


# ------------------------------------------------------------------------------------- one claim


class ClaimEntry(msgspec.Struct):
    """A claim in the file."""

    address: str
    amount: str
    nodes: list[str]
    proof: list[str]


class _Own(msgspec.Struct):
    root: str
    claims: list[ClaimEntry]


class _File(msgspec.Struct):
    psyche: _Own


def proof_of(path: Path, who: str) -> tuple[str, ClaimEntry]:
    """Look up the claim of an address, or of the node whose PeerID ends in ``who``, and verify its proof.

    Returns the root and the claim. Raises :class:`PsycheError` if the file cannot be read, if ``who`` does not match
    exactly one claim, or if the proof fails.
    """
    try:
        if path.stat().st_size > MAX_CLAIMS_FILE:
            raise PsycheError(f"{path} is too large for a claims file")
        own = msgspec.json.decode(path.read_bytes(), type=_File).psyche
    except OSError as error:
        raise PsycheError(f"cannot read {path}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise PsycheError(f"{path} was not written by `psyche ledger claims`: {str(error)[:120]}") from None
    end = who.removeprefix("…")
    found = [
        one for one in own.claims if one.address.lower() == who.lower() or any(name.endswith(end) for name in one.nodes)
    ]
    if len(found) != 1:
        what = "no claim" if not found else f"{len(found)} claims"
        raise PsycheError(f"{what} in {path} for {who}: give a whole address, or more of the end of a PeerID")
    (entry,) = found
    try:
        claim = Claim(_bytes(entry.address, ADDRESS_BYTES), int(entry.amount))
        holds = proves(_bytes(own.root, 32), claim, [_bytes(one, 32) for one in entry.proof])
    except (ValueError, OverflowError):
        holds = False
    if not holds:
        raise PsycheError(f"the proof of {entry.address} in {path} does not lead to the root: the file was changed")
    return own.root, entry


def _bytes(text: str, size: int) -> bytes:
    found = bytes.fromhex(text.removeprefix("0x"))
    if len(found) != size:
        raise ValueError(f"{len(found)} bytes instead of {size}")
    return found


def _hex(hash: bytes) -> str:
    return f"0x{hash.hex()}"


def _json(content: dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
