"""What a ledger says of its nodes' credit, as plain values: for tables, for sentences, or as JSON."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from psyche.config import Manifest, Run
from psyche.config.manifest import chain_rules
from psyche.ledger.round_report import decode_record, match_node
from psyche.ledger.store import Ledger
from psyche.protocol.credits import Account, Change, CreditAccounts, round_work
from psyche.telemetry.lines import exclusion_sentence


class NodeCredit(msgspec.Struct):
    """A node's credit, in tokens."""

    node: str
    final: int
    pending: int
    forfeited: int
    private: int
    """Tokens from private data among its accepted ones: unaudited."""
    audited: int
    """Audits of its work that have ended, and"""
    passed: int
    """those among them that it passed."""
    audits: int
    """Audits of others' work that it was paid for."""
    probation: bool
    banned: int | None
    """Round in which it was convicted."""
    payout: str | None
    """Address that it wants to be paid at."""


class CreditReport(msgspec.Struct):
    """All that ``psyche ledger credits`` shows."""

    run_id: str
    round: int
    """The last one that counts."""
    missing: list[tuple[int, int]]
    """First and last round of each gap: what was earned there is not counted."""
    credits: list[NodeCredit]
    """Most final credit first."""


class CreditHistory(msgspec.Struct):
    """All that ``psyche ledger why`` tells: each credit that a node earned, in order, and where that leaves it."""

    credit: NodeCredit
    changes: list[Change]
    held: str | None
    """Why what is pending does not become final as usual, if so."""


def credit_report(ledger: Ledger, manifest: Manifest, node: str | None = None) -> CreditReport:
    """The credit of all nodes, or of the one whose PeerID ends in ``node``. No signature is checked.

    Raises :class:`~psyche.ledger.store.LedgerError` for what cannot be decoded, and where ``node`` is not exactly one.
    """
    books, _ = read_accounts(ledger, manifest)
    return report_accounts(ledger, books, node)


def report_accounts(ledger: Ledger, books: CreditAccounts, node: str | None = None) -> CreditReport:
    """The same of books that were read before."""
    credits = sorted(map(_credit, books.accounts.values()), key=lambda one: (-one.final, -one.pending, one.node))
    if node is not None:
        me = match_node(ledger, books.accounts, node)
        credits = [one for one in credits if one.node == me]
    missing = [(gap.start, gap.stop - 1) for gap in ledger.missing()]
    return CreditReport(ledger.run_id.hex(), books.round, missing, credits)


def credit_history(ledger: Ledger, manifest: Manifest, node: str) -> CreditHistory:
    """Why the credit of the one node whose PeerID ends in ``node`` is what it is. Raises as :func:`credit_report`."""
    end = node.removeprefix("…")
    books, settled = read_accounts(ledger, manifest, lambda change: change.node.endswith(end))
    account = books.accounts[match_node(ledger, books.accounts, node)]
    changes = sorted((*settled, *account.pending), key=lambda change: change.round)
    return CreditHistory(_credit(account), changes, _held(account, manifest))


def read_accounts(
    ledger: Ledger, manifest: Manifest, wanted: Callable[[Change], bool] = lambda change: False
) -> tuple[CreditAccounts, list[Change]]:
    """The accounts after all rounds that are there, and what was settled on the way, if ``wanted``."""
    rules = chain_rules(manifest)
    books = CreditAccounts(rules)
    settled: list[Change] = []
    for entry in ledger.entries():
        settled += filter(wanted, books.enter(round_work(decode_record(ledger, entry), rules.probation)))
    return books, settled


def in_words(change: Change, run: Run) -> str:
    """A change as its owner is told of it."""
    if change.kind == "excluded":
        return f"nothing: {exclusion_sentence(change.reason)}"
    what = f"{change.amount:,} earned: {change.reason}"
    if change.status == "final":
        return f"{what}; final since round {change.settled:,}"
    if change.status == "pending":
        return f"{what}; pending until round {min(change.round + run.audits.window, run.rounds.total):,}"
    when = "at once" if change.settled == change.round else f"in round {change.settled:,}"
    return f"{what}; forfeited {when}, because {change.because}"


def credit_totals(books: CreditAccounts) -> tuple[int, int, int]:
    """Final, pending and forfeited credit of all together."""
    accounts = books.accounts.values()
    return (
        sum(one.final for one in accounts),
        sum(one.waiting for one in accounts),
        sum(one.forfeited for one in accounts),
    )


def _credit(account: Account) -> NodeCredit:
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


def _held(account: Account, manifest: Manifest) -> str | None:
    if account.banned:
        return f"convicted in round {account.banned:,}: nothing is earned any more"
    if account.newcomer and account.pending:
        return f"on probation: nothing becomes final before {manifest.run.rounds.probation} contributions are accepted"
    return None
