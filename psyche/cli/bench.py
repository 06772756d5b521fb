"""``psyche bench``: measurements, with the rival in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure, with the rival in the same run.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps ``convergence`` a subcommand while it is the only one."""


@app.command()
def convergence(
    json: Annotated[Path | None, typer.Option(help="Write the rows here, too.", show_default=False)] = None,
    full: Annotated[
        bool, typer.Option("--full", help="20 tokens per parameter and a third seed; takes four times as long.")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(help="Run only rows whose name contains this text.", show_default=False),
    ] = None,
    codecs: Annotated[
        bool,
        typer.Option("--codecs", help="Compare all codecs instead, against tokens, rounds and bytes; half an hour."),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="With --codecs: draw the curves to this PNG file.", show_default=False)
    ] = None,
) -> None:
    """Held-out loss of large-batch AdamW, DiLoCo fp32 and DiLoCo int8, at equal tokens and at equal steps."""
    from psyche.bench import codec_quality
    from psyche.bench import convergence as large_batch
    from psyche.cli.data import progress_display

    if codecs:
        codec_quality.main(json, plot, full=full, only=only, preparing=progress_display)
    elif plot is not None:
        raise typer.BadParameter("only the curves of --codecs are drawn", param_hint="--plot")
    else:
        large_batch.main(json, full=full, only=only, preparing=progress_display)
