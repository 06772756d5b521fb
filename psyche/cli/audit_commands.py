"""``psyche audit``: calibrate audits, and repeat one from its evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from psyche.cli.options import Json, RunConfig

app = typer.Typer(help="Check contributions by replaying their training steps.", no_args_is_help=True)


@app.command()
def calibrate(
    config: RunConfig,
    rounds: Annotated[int, typer.Option(help="Rounds to measure on; more give narrower bounds.", min=4)] = 8,
    json: Annotated[Path | None, typer.Option(help="Write every error to this JSON file.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot the errors to this PNG file.", show_default=False)] = None,
) -> None:
    """Measure replay errors of honest nodes and of cheats on this model; print thresholds that separate them."""
    from psyche.audit import calibrate_command as calibrating
    from psyche.data.progress_display import progress_display

    with progress_display() as report:
        loaded, store = calibrating.prepared(config, report)
    calibrating.calibrate(loaded, store, rounds, json=json, picture=plot)


@app.command()
def rerun(
    path: Annotated[Path, typer.Argument(help="Directory of an auditor's node.", show_default=False)],
    node: Annotated[
        str | None, typer.Argument(help="The audited node: its PeerID or the end of it.", show_default=False)
    ] = None,
    round_number: Annotated[
        int | None, typer.Argument(help="The audited round.", show_default=False, metavar="ROUND")
    ] = None,
    segment: Annotated[
        int | None, typer.Option(help="Replay only this segment, counted from 0.", show_default=False)
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Directory of token stores. Default: node.cache.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json: Json = False,
) -> None:
    """Repeat a failed audit from the evidence that the auditor kept, so that nobody has to trust its finding.

    Without NODE and ROUND, list the evidence. The auditors of a convicted node have it: copy their directories (ledger,
    manifest and evidence) to any machine that has the run's training data.
    """
    import sys

    from psyche.audit.evidence_store import EVIDENCE_DIRECTORY, EvidenceStore
    from psyche.cli.options import ledger_file, read_manifest

    ledger = ledger_file(path)
    manifest, evidence = read_manifest(None, ledger), EvidenceStore(ledger.parent / EVIDENCE_DIRECTORY)
    if node is None or round_number is None:
        cases = evidence.cases()
        typer.echo(
            "\n".join(f"{name} {number}" for name, number in cases) or f"{path} has no evidence: no audit failed"
        )
        return
    import msgspec

    from psyche.audit import offline_audit
    from psyche.config import Node

    audited = offline_audit.select_case(evidence, node, round_number)
    case = offline_audit.case_from_ledger(ledger, manifest, audited, round_number)
    settings = Node(device=device) if cache is None else Node(device=device, cache=cache)
    found = offline_audit.replay_from_evidence(
        ledger.parent / EVIDENCE_DIRECTORY,
        case,
        manifest,
        settings,
        only=segment,
        progress=lambda text: print(f"{text} …", file=sys.stderr),
    )
    typer.echo(msgspec.json.encode(found) if json else "\n".join(offline_audit.describe(found, manifest)))
