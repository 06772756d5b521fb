"""What a ledger records about its nodes' credits, as plain values for tables and JSON. No signature is verified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from psyche.config import Manifest
from psyche.config.manifest import chain_rules
from psyche.ledger.round_report import decode_record, match_node
from psyche.ledger.store import Ledger
from psyche.protocol.credits import Account, Change, CreditAccounts, round_work


class NodeCredit(msgspec.Struct):
    """A node's credit, in tokens."""

    node: str
    final: int
    pending: int
    forfeited: int
    private: int
    """Accepted tokens of private data, which cannot be audited."""
    audited: int
    """Closed audits of its contributions."""
    passed: int
    """Audits among ``audited`` that passed."""
    audits: int
    """Audits of other nodes that it was paid for."""
    probation: bool
    banned: int | None
    """Round in which it was convicted; None if it never was."""
    payout: str | None
    """Payout address that it named; None if it named none."""


class CreditReport(msgspec.Struct):
    """The output of ``psyche ledger credits``."""

    run_id: str
    round: int
    """The last round that is counted."""
    missing: list[tuple[int, int]]
    """First and last round of each gap; credit earned there is not counted."""
    credits: list[NodeCredit]
    """Accounts by final credit, descending."""


class CreditHistory(msgspec.Struct):
    """The output of ``psyche ledger why``: every change of a node's credit in order, and the result."""

    credit: NodeCredit
    changes: list[Change]
    held: Literal["banned", "probation"] | None
    """Why pending credit does not become final as usual; None if it does."""


def credit_report(ledger: Ledger, manifest: Manifest, node: str | None = None) -> CreditReport:
    """Report the credit of all nodes, or of the one whose PeerID ends in ``node``.

    Raises :class:`~psyche.ledger.store.LedgerError` if a certificate cannot be decoded, or if ``node`` does not match
    exactly one node.
    """
    credits, _ = read_credits(ledger, manifest)
    rows = sorted(map(_row, credits.accounts.values()), key=lambda one: (-one.final, -one.pending, one.node))
    if node is not None:
        matched = match_node(ledger, credits.accounts, node)
        rows = [one for one in rows if one.node == matched]
    missing = [(gap.start, gap.stop - 1) for gap in ledger.missing()]
    return CreditReport(ledger.run_id.hex(), credits.round, missing, rows)


def credit_history(ledger: Ledger, manifest: Manifest, node: str) -> CreditHistory:
    """Report every change of the credit of the node whose PeerID ends in ``node``. Raises as :func:`credit_report`."""
    suffix = node.removeprefix("…")
    credits, settled = read_credits(ledger, manifest, lambda change: change.node.endswith(suffix))
    account = credits.accounts[match_node(ledger, credits.accounts, node)]
    changes = sorted((*settled, *account.pending), key=lambda change: change.round)
    held: Literal["banned", "probation"] | None = None
    if account.banned:
        held = "banned"
    elif account.newcomer and account.pending:
        held = "probation"
    return CreditHistory(_row(account), changes, held)


def read_credits(
    ledger: Ledger, manifest: Manifest, wanted: Callable[[Change], bool] = lambda change: False
) -> tuple[CreditAccounts, list[Change]]:
    """Compute the accounts over all rounds in the ledger, and collect the settled changes that are ``wanted``."""
    rules = chain_rules(manifest)
    credits = CreditAccounts(rules)
    settled: list[Change] = []
    for entry in ledger.entries():
        settled += filter(wanted, credits.enter(round_work(decode_record(ledger, entry), rules.probation)))
    return credits, settled


def credit_totals(credits: CreditAccounts) -> tuple[int, int, int]:
    """Return final, pending and forfeited credit of all accounts together."""
    accounts = credits.accounts.values()
    return (
        sum(one.final for one in accounts),
        sum(one.waiting for one in accounts),
        sum(one.forfeited for one in accounts),
    )


def _row(account: Account) -> NodeCredit:
    return NodeCredit(
        node=account.node,
        final=account.final,
        pending=account.waiting,
        forfeited=account.forfeited,
        private=account.private,
        audited=account.audited,
        passed=account.passed,
        audits=account.audits,
        probation=account.newcomer,
        banned=account.banned or None,
        payout=f"0x{account.payout.hex()}" if account.payout else None,
    )
