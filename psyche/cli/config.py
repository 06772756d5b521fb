"""``psyche config``: look at a configuration before it costs anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check configuration files.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps ``check`` a subcommand while it is the only one."""


@app.command("check")
def check(
    config: Annotated[Path, typer.Argument(help="Configuration file (YAML).", show_default=False)],
    tflops: Annotated[
        float, typer.Option(help="What a member sustains, in TFLOP/s. Default: an RTX 4090 at 40 %.", min=1e-3)
    ] = 66.0,
) -> None:
    """Check a file and print what its run would cost: memory per node, bytes per round, tokens, utilisation."""
    from psyche.config import load_config

    loaded = load_config(config)  # before the slow imports: most errors are found here
    from psyche.launch.costs import costs_of

    for label, value in costs_of(loaded.run).lines(tflops * 1e12):
        typer.echo(f"{label:28} {value}")
