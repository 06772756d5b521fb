"""``psyche ledger credits | why | claims | proof``: what nodes earned, why, and files for paying it out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from psyche.cli.options import (
    Json,
    LedgerPath,
    ManifestPath,
    ledger_file,
    read_manifest,
    round_ranges,
    verified,
)

if TYPE_CHECKING:  # see cli/ledger_commands.py
    from rich.table import Table

    from psyche.config import Run
    from psyche.ledger.credit_report import CreditHistory, CreditReport, NodeCredit
    from psyche.protocol.credits import Change

NodeId = Annotated[str, typer.Argument(help="The node's PeerID or the end of it.", show_default=False)]


def credits_command(
    path: LedgerPath,
    node: Annotated[
        str | None, typer.Option(help="Show only this node: its PeerID or the end of it.", show_default=False)
    ] = None,
    manifest: ManifestPath = None,
    json: Json = False,
) -> None:
    """Print what each node has earned: one credit per token of accepted work.

    Credit is pending until the work's challenge window ends, then final; a conviction forfeits it. Signatures are not
    verified: run `psyche ledger verify` for that. A ledger with missing rounds gives exit code 1.
    """
    from psyche.ledger.credit_report import credit_report
    from psyche.ledger.store import Ledger

    file = ledger_file(path)
    with Ledger.read(file) as ledger:
        report = credit_report(ledger, read_manifest(manifest, file), node)
    if json:
        import msgspec

        typer.echo(msgspec.json.encode(report))
        raise typer.Exit(1 if report.missing else 0)
    from rich.console import Console

    console = Console()
    if missing := round_ranges(report.missing):
        text = f"incomplete: this ledger lacks {missing}, whose credits are not counted; start its node to fetch them"
        console.print(text, markup=False, highlight=False)
    console.print(_table(report))
    if missing:
        raise typer.Exit(1)


def why_command(
    path: LedgerPath,
    node: NodeId,
    manifest: ManifestPath = None,
    json: Json = False,
) -> None:
    """Print every change of a node's credit, with its round and reason."""
    from psyche.ledger.credit_report import credit_history
    from psyche.ledger.store import Ledger

    file = ledger_file(path)
    terms = read_manifest(manifest, file)
    with Ledger.read(file) as ledger:
        history = credit_history(ledger, terms, node)
    if json:
        import msgspec

        typer.echo(msgspec.json.encode(history))
        return
    from psyche.telemetry.formatting import clean

    for change in history.changes:
        typer.echo(f"round {change.round:,}: {clean(_describe_change(change, terms.run), 500)}")
    typer.echo(_sentence(history.credit) + _describe_hold(history, terms.run))


def claims_command(
    path: LedgerPath,
    out: Annotated[Path, typer.Option(help="File to write.", show_default=False)],
    manifest: ManifestPath = None,
    format: Annotated[
        Literal["merkle", "weights"],
        typer.Option(help="merkle: OpenZeppelin StandardMerkleTree; weights: u16 per node, as Bittensor uses them."),
    ] = "merkle",
) -> None:
    """Write final credits to a file for paying them out: a Merkle tree with a proof per address, or a weight vector.

    The ledger is verified first and must be complete, so that everyone gets the same file.
    """
    from psyche.durable import disk_errors, write_durably
    from psyche.payouts.claims_file import claims_file, payable, require_whole, weights_file

    file = ledger_file(path)
    terms = read_manifest(manifest, file)
    summary = verified(file, terms)
    require_whole(summary, file)
    accounts, where = summary.credits.accounts.values(), (terms.run_id, summary.last)
    owed = payable(accounts)
    content = claims_file(owed, *where) if format == "merkle" else weights_file(accounts, *where)
    with disk_errors(out, "--out"):
        write_durably(out, content)
    if format == "weights":
        typer.echo(f"{out}: weights of {sum(account.final > 0 for account in accounts):,} nodes")
        return
    total = sum(claim.amount for claim in owed.claims)
    typer.echo(f"{out}: {total:,} credits of {len(owed.claims):,} addresses, after round {summary.last:,}")
    typer.echo(f"root: {_root(content)}")
    for name, amount in owed.unclaimed.items():
        typer.echo(f"unclaimed: {amount:,} of {name}, which gave no payout address")


def proof_command(
    file: Annotated[Path, typer.Argument(help="File written by `psyche ledger claims`.", show_default=False)],
    who: Annotated[str, typer.Argument(help="An Ethereum address, or the end of a PeerID.", show_default=False)],
) -> None:
    """Verify one claim against the file's Merkle root and print it with its proof."""
    from psyche.payouts.claims_file import proof_of

    root, entry = proof_of(file, who)
    typer.echo(f"root:    {root}\naddress: {entry.address}\namount:  {entry.amount}")
    typer.echo("proof:   " + (", ".join(entry.proof) or "empty: the tree has one claim"))


def _root(content: bytes) -> str:
    import msgspec

    return str(msgspec.json.decode(content)["tree"][0])


def _table(report: CreditReport) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from psyche.telemetry.formatting import peer_name

    table = Table(box=SIMPLE_HEAD, title=f"credits after round {report.round:,}", title_justify="left")
    table.add_column("node", no_wrap=True)
    for heading in ("final", "pending", "forfeited", "passed", "audits"):
        table.add_column(heading, justify="right")
    table.add_column("remarks")
    for one in report.credits:
        counts = (f"{one.final:,}", f"{one.pending:,}", f"{one.forfeited:,}" if one.forfeited else "")
        passed = f"{one.passed}/{one.audited}" if one.audited else ""
        table.add_row(peer_name(one.node), *counts, passed, f"{one.audits}" if one.audits else "", _remarks(one))
    return table


def _remarks(one: NodeCredit) -> str:
    found = []
    if one.banned is not None:
        found.append(f"convicted in round {one.banned:,}")
    if one.probation:
        found.append("on probation")
    if one.private:
        found.append(f"private data, unaudited: {one.private:,} tokens")
    return "; ".join(found)


def _describe_change(change: Change, run: Run) -> str:
    from psyche.telemetry.lines import exclusion_sentence

    if change.kind == "excluded":
        return f"nothing: {exclusion_sentence(change.reason)}"
    earned = f"{change.amount:,} earned: {change.reason}"
    if change.status == "final":
        return f"{earned}; final since round {change.settled:,}"
    if change.status == "pending":
        return f"{earned}; pending until round {min(change.round + run.audits.window, run.rounds.total):,}"
    when = "at once" if change.settled == change.round else f"in round {change.settled:,}"
    return f"{earned}; forfeited {when}, because {change.because}"


def _describe_hold(history: CreditHistory, run: Run) -> str:
    if history.held == "banned":
        return f"; convicted in round {history.credit.banned:,}: it earns nothing any more"
    if history.held == "probation":
        return f"; on probation: nothing becomes final before {run.rounds.probation} contributions are accepted"
    return ""


def _sentence(one: NodeCredit) -> str:
    paid = f"paid to {one.payout}" if one.payout else "no payout address (set one with psyche join --payout 0x…)"
    return f"{one.final:,} final, {one.pending:,} pending, {one.forfeited:,} forfeited; {paid}"
