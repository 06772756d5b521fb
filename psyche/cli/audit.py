"""``psyche audit``: how contributions are checked by doing them again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check contributions by doing them again.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps the only command a command of its own."""


@app.command()
def calibrate(
    config: Annotated[Path, typer.Argument(help="Configuration file (YAML) with a run: part.", show_default=False)],
    rounds: Annotated[int, typer.Option(help="Of the run, to measure on; more give narrower bounds.", min=4)] = 8,
    json: Annotated[Path | None, typer.Option(help="Write every error here, too.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the errors to this PNG file.", show_default=False)] = None,
) -> None:
    """Measure by how much honest nodes of this model differ, and frauds; and say which thresholds tell them apart."""
    from psyche.cli.data import progress_display
    from psyche.roles import calibrating

    with progress_display() as report:
        loaded, store = calibrating.prepared(config, report)
    calibrating.calibrate(loaded, store, rounds, json=json, picture=plot)
