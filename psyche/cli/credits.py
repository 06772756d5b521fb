"""``psyche ledger credits | why | claims | proof``: what contributors earned, why, and for whom to pay it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from psyche.cli.places import ManifestFile, Place, checked, ledger_file, manifest_of, spans

if TYPE_CHECKING:  # see cli/ledger.py
    from rich.table import Table

    from psyche.ledger.credit_report import Credit, CreditStory

NodeEnd = Annotated[str, typer.Argument(help="The node's PeerID, or how that ends.", show_default=False)]


def credits_command(
    path: Place,
    node: Annotated[
        str | None, typer.Option(help="Only this node: its PeerID, or how that ends.", show_default=False)
    ] = None,
    manifest: ManifestFile = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Say what each node has earned: a credit for each token of verified work.

    Pending credit becomes final once the rounds have passed in which the work can be challenged, and is forfeited where
    it was cheated. Checks no signature; ``verify`` does.
    """
    from psyche.ledger.credit_report import credits_of
    from psyche.ledger.store import Ledger

    file = ledger_file(path)
    with Ledger.read(file) as ledger:
        story = credits_of(ledger, manifest_of(manifest, file), node)
    if json:
        import msgspec

        typer.echo(msgspec.json.encode(story))
        return
    from rich.console import Console

    console = Console()
    console.print(_table(story))
    if missing := spans(story.missing):
        console.print(f"missing here, and not counted: {missing}", markup=False, highlight=False)


def why_command(
    path: Place,
    node: NodeEnd,
    manifest: ManifestFile = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Say why a node's credit is what it is: each change, with its round and reason."""
    from psyche.ledger.credit_report import history_of, in_words
    from psyche.ledger.store import Ledger

    file = ledger_file(path)
    terms = manifest_of(manifest, file)
    with Ledger.read(file) as ledger:
        history = history_of(ledger, terms, node)
    if json:
        import msgspec

        typer.echo(msgspec.json.encode(history))
        return
    from psyche.telemetry.formatting import clean

    for change in history.changes:
        typer.echo(f"round {change.round:,}: {clean(in_words(change, terms.run), 500)}")
    typer.echo(_sentence(history.credit) + (f"; {history.held}" if history.held else ""))


def claims_command(
    path: Place,
    out: Annotated[Path, typer.Option(help="File to write.", show_default=False)],
    manifest: ManifestFile = None,
    format: Annotated[
        Literal["merkle", "weights"],
        typer.Option(help="merkle: OpenZeppelin's StandardMerkleTree; weights: u16 by node, as Bittensor has them."),
    ] = "merkle",
) -> None:
    """Write final credits for somebody else to pay: a Merkle tree with a proof for each address, or a weight vector.

    The ledger is verified first, and has to be whole, so that everybody who does this gets the same file.
    """
    from psyche.durable import disk_errors, write_durably
    from psyche.payouts.claims_file import claims_file, payable, require_whole, weights_file

    file = ledger_file(path)
    terms = manifest_of(manifest, file)
    summary = checked(file, terms)
    require_whole(summary, file)
    accounts, where = summary.books.accounts.values(), (terms.run_id, summary.last)
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
        typer.echo(f"unclaimed: {amount:,} of {name}, which named no address")


def proof_command(
    file: Annotated[Path, typer.Argument(help="What `psyche ledger claims` wrote.", show_default=False)],
    who: Annotated[str, typer.Argument(help="An address, or how a PeerID ends.", show_default=False)],
) -> None:
    """Print one claim with its proof, for a distributor, once it is checked against the file's root."""
    from psyche.payouts.claims_file import proof_of

    root, entry = proof_of(file, who)
    typer.echo(f"root:    {root}\naddress: {entry.address}\namount:  {entry.amount}")
    typer.echo("proof:   " + (", ".join(entry.proof) or "none is needed: the claim is the only one"))


def _root(content: bytes) -> str:
    import msgspec

    return str(msgspec.json.decode(content)["tree"][0])


def _table(story: CreditStory) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from psyche.telemetry.formatting import peer_name

    table = Table(box=SIMPLE_HEAD, title=f"credits after round {story.round:,}", title_justify="left")
    table.add_column("node", no_wrap=True)
    for heading in ("final", "pending", "forfeited", "passed", "audits"):
        table.add_column(heading, justify="right")
    table.add_column("remarks")
    for one in story.credits:
        counts = (f"{one.final:,}", f"{one.pending:,}", f"{one.forfeited:,}" if one.forfeited else "")
        passed = f"{one.passed}/{one.audited}" if one.audited else ""
        table.add_row(peer_name(one.node), *counts, passed, f"{one.audits}" if one.audits else "", _remarks(one))
    return table


def _remarks(one: Credit) -> str:
    found = []
    if one.banned is not None:
        found.append(f"convicted in round {one.banned:,}")
    if one.probation:
        found.append("on probation")
    if one.private:
        found.append(f"private data, unaudited: {one.private:,} tokens")
    return "; ".join(found)


def _sentence(one: Credit) -> str:
    paid = f"to be paid to {one.payout}" if one.payout else "no address named (psyche join --payout 0x…)"
    return f"{one.final:,} final, {one.pending:,} pending, {one.forfeited:,} forfeited; {paid}"
