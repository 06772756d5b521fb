"""``psyche ledger show | verify``: print and verify the certified chain that every node and coordinator keeps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from psyche.cli.credits_commands import claims_command, credits_command, proof_command, why_command
from psyche.cli.options import (
    Json,
    LedgerPath,
    ManifestPath,
    ledger_file,
    read_manifest,
    round_ranges,
    verified,
)

if TYPE_CHECKING:  # `psyche --help` imports this module; heavy imports are made by the command that needs them
    from rich.table import Table

    from psyche.ledger.round_report import ClosedAudit, LedgerReport, LedgerRound

app = typer.Typer(help="The certified rounds of a run, and the credits earned in them.", no_args_is_help=True)

_PREFIX = 8
"""Hex digits of a hash shown in a table."""


@app.command("show")
def show_command(
    path: LedgerPath,
    last: Annotated[int | None, typer.Option(help="Show only the last N rounds.", min=1, show_default=False)] = None,
    node: Annotated[
        str | None, typer.Option(help="Show only this member: its PeerID or the end of it.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Print the certified rounds: members, tokens, rejected contributions with reasons. Verifies no signature."""
    from psyche.ledger.round_report import ledger_report
    from psyche.ledger.store import Ledger

    with Ledger.read(ledger_file(path)) as ledger:
        report = ledger_report(ledger, last=last, node=node)
    if json:
        import msgspec

        typer.echo(msgspec.json.encode(report))
        return
    from rich.console import Console

    console = Console()
    console.print(_rounds_table(report))
    console.print(_totals_table(report))
    for line in _notes(report):
        console.print(line, markup=False, highlight=False)


@app.command("verify")
def verify_command(path: LedgerPath, manifest: ManifestPath = None) -> None:
    """Verify every signature, vote and hash link against the run's manifest, and name the first bad round.

    Then add up all credits again from the ledger alone.
    """
    from psyche.ledger.credit_report import credit_totals

    file = ledger_file(path)
    found = verified(file, read_manifest(manifest, file))
    missing = round_ranges((gap.start, gap.stop - 1) for gap in found.missing)
    typer.echo(
        f"valid: {found.rounds:,} certified rounds up to round {found.last:,}, {sum(found.tokens.values()):,} tokens "
        f"of {len(found.tokens):,} nodes, {found.reconfigurations:,} reconfigurations; "
        + (f"missing here: {missing}" if missing else "no round is missing")
    )
    final, pending, forfeited = credit_totals(found.credits)
    convicted = sum(account.banned > 0 for account in found.credits.accounts.values())
    typer.echo(f"credits: {final:,} final, {pending:,} pending, {forfeited:,} forfeited; {convicted:,} nodes convicted")


app.command("credits")(credits_command)
app.command("why")(why_command)
app.command("claims")(claims_command)
app.command("proof")(proof_command)


# ------------------------------------------------------------------------------------- the tables


def _rounds_table(report: LedgerReport) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, title=f"run {report.run_id[:16]}…", title_justify="left")
    for heading in ("round", "accepted", "tokens"):
        table.add_column(heading, justify="right")
    table.add_column("record", no_wrap=True)
    table.add_column("state root", no_wrap=True)
    table.add_column("remarks")
    for ledger_round in report.rounds:
        accepted = [part.tokens for part in ledger_round.members if part.tokens is not None]
        table.add_row(
            f"{ledger_round.round:,}",
            f"{len(accepted)}/{len(ledger_round.members)}",
            f"{sum(accepted):,}",
            ledger_round.record[:_PREFIX],
            "unknown" if ledger_round.state_root is None else ledger_round.state_root[:_PREFIX],
            _remarks(ledger_round),
        )
    return table


def _remarks(ledger_round: LedgerRound) -> str:
    """List rejected contributions, outvoted results, private data, reconfigurations and convictions of a round."""
    from rich.markup import escape

    from psyche.telemetry.formatting import peer_name
    from psyche.telemetry.lines import exclusion_sentence

    lines = ["reconfiguration"] if ledger_round.is_reconfiguration else []
    lines += [
        f"{peer_name(p.node)}: {exclusion_sentence(p.reason or '')}" for p in ledger_round.members if p.tokens is None
    ]
    lines += [f"{peer_name(part.node)}: outvoted on a result" for part in ledger_round.members if part.dissenter]
    if private := [peer_name(part.node) for part in ledger_round.members if part.private]:
        lines.append(f"private data, unaudited: {', '.join(private)}")
    lines += [
        _closed_audit(one)
        for one in ledger_round.audits
        if one.false_auditors or one.outcome in ("convicted", "unserved")
    ]
    return escape("\n".join(lines))


def _closed_audit(one: ClosedAudit) -> str:
    """Describe an audit that closed against a node, with the auditors' findings."""
    from psyche.telemetry.formatting import peer_name

    outcome = {"convicted": "convicted", "unserved": "did not serve its audit data"}.get(one.outcome, one.outcome)
    findings = [
        f"{peer_name(found.auditor)}: "
        + (
            f"relative error {found.error:.4f} in segment {found.segment}"
            if found.outcome == "measured"
            else found.outcome
        )
        for found in one.findings
    ]
    convicted = f"; false finding by {', '.join(map(peer_name, one.false_auditors))}" if one.false_auditors else ""
    text = "; ".join(findings) or "no finding on record"
    return f"{peer_name(one.accused)}, round {one.audited_round:,}: {outcome} ({text}){convicted}"


def _totals_table(report: LedgerReport) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from psyche.telemetry.formatting import peer_name, size

    title = f"totals of {report.held:,} rounds"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("node", no_wrap=True)
    for heading in ("accepted", "tokens", "unaudited", "payloads"):
        table.add_column(heading, justify="right")
    for node, total in report.totals.items():
        unaudited = f"{total.unaudited:,}" if total.unaudited else ""
        rounds = f"{total.accepted:,}/{total.rounds:,}"
        table.add_row(peer_name(node), rounds, f"{total.tokens:,}", unaudited, size(total.payload_bytes))
    return table


def _notes(report: LedgerReport) -> Iterable[str]:
    if report.missing:
        yield f"missing here: {round_ranges(report.missing)}"
    if report.superseded:
        again = ", ".join(f"{number:,}" for number in sorted(set(report.superseded)))
        yield f"certified twice, an earlier record was superseded: round {again}"
