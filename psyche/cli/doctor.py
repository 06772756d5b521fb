"""``psyche doctor``: what is wrong with this machine, and the mend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from psyche.tools.checks import Finding

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    invite: Annotated[
        str | None,
        typer.Argument(help="A run's invite: then the run's own needs are checked, too.", show_default=False),
    ] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Where the node would keep its files, as for join.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A file whose node: part holds this machine's settings.", show_default=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="TCP port to listen at, as for join.", min=1, max=65535, show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this machine: versions, port, clock, reachability, disk, memory, speed, line. Exit code 1 if one fails."""
    import asyncio
    import json
    from dataclasses import asdict

    from psyche.cli.process import RUNS, home_of, read_invite
    from psyche.config import load_node, override_node

    parsed = None if invite is None else read_invite(invite)
    settings = override_node(load_node(config), port=port)
    where = directory or (RUNS.expanduser() if parsed is None else home_of(parsed))
    from psyche.tools.doctor import examine

    findings: list[Finding] = []
    asyncio.run(examine(parsed, settings, where, findings.append))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _show(findings)
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(1)


def _show(findings: list[Finding]) -> None:
    """A table; on a narrow terminal the mends wrap, they are never cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from psyche.telemetry.formatting import clean

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for finding in findings:
        told = Text(clean(finding.found, 400))
        if finding.mend:
            told.append(f"\n→ {clean(finding.mend, 600)}", style="bold")
        table.add_row(Text(finding.level, style=STYLES[finding.level]), finding.check, told)
    Console().print(table)
