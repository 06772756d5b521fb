"""``psyche config``: check a configuration before anything is spent on it."""

from __future__ import annotations

from typing import Annotated

import typer

from psyche.cli.options import RunConfig

app = typer.Typer(help="Check configuration files.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep ``check`` a subcommand while it is the only one."""


@app.command("check")
def check(
    config: RunConfig,
    tflops: Annotated[
        float, typer.Option(help="Sustained TFLOP/s of one node. Default: an RTX 4090 at 40 %.", min=1e-3)
    ] = 66.0,
) -> None:
    """Validate a file and print what its run would cost: memory per node, bytes per round, tokens, utilisation."""
    from psyche.config import load_config

    loaded = load_config(config)  # before the slow imports: most errors are found here
    from psyche.tools.costs import costs_of

    for label, value in costs_of(loaded.run).lines(tflops * 1e12):
        typer.echo(f"{label:28} {value}")
