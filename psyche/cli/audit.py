"""``psyche audit``: how contributions are checked by doing them again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check contributions by doing them again.", no_args_is_help=True)


@app.command()
def calibrate(
    config: Annotated[Path, typer.Argument(help="Configuration file (YAML) with a run: part.", show_default=False)],
    rounds: Annotated[int, typer.Option(help="Of the run, to measure on; more give narrower bounds.", min=4)] = 8,
    json: Annotated[Path | None, typer.Option(help="Write every error here, too.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the errors to this PNG file.", show_default=False)] = None,
) -> None:
    """Measure by how much honest nodes of this model differ, and frauds; and say which thresholds tell them apart."""
    from psyche.audit import calibrate_command as calibrating
    from psyche.cli.data import progress_display

    with progress_display() as report:
        loaded, store = calibrating.prepared(config, report)
    calibrating.calibrate(loaded, store, rounds, json=json, picture=plot)


@app.command()
def rerun(
    path: Annotated[Path, typer.Argument(help="Directory of a node that audited.", show_default=False)],
    node: Annotated[
        str | None, typer.Argument(help="Whose work: its PeerID, or how that ends.", show_default=False)
    ] = None,
    round_number: Annotated[int | None, typer.Argument(help="Of which round.", show_default=False)] = None,
    segment: Annotated[int | None, typer.Option(help="Only this one, from 0.", show_default=False)] = None,
    cache: Annotated[Path | None, typer.Option(help="Where the run's text is kept.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Do work again that an auditor did not pass, from the evidence that it kept: nobody has to take its word.

    Without NODE and ROUND, say which evidence there is. A convicted node's auditors have it; copy their directories
    (ledger, manifest and evidence) to any machine that has the run's text.
    """
    import sys

    from psyche.audit.evidence_store import EVIDENCE, Evidence
    from psyche.cli.places import ledger_file, manifest_of

    ledger = ledger_file(path)
    manifest, evidence = manifest_of(None, ledger), Evidence(ledger.parent / EVIDENCE)
    if node is None or round_number is None:
        cases = evidence.cases()
        typer.echo("\n".join(f"{name} {number}" for name, number in cases) or f"{path} has no evidence: nothing failed")
        return
    import msgspec

    from psyche.audit import offline_audit as again
    from psyche.config import Node

    case = again.case_in(ledger, manifest, again.chosen(evidence, node, round_number), round_number)
    settings = Node(device=device) if cache is None else Node(device=device, cache=cache)
    found = again.rerun(
        ledger.parent / EVIDENCE,
        case,
        manifest,
        settings,
        only=segment,
        told=lambda text: print(f"{text} …", file=sys.stderr),
    )
    typer.echo(msgspec.json.encode(found) if json else "\n".join(again.in_words(found, manifest)))
