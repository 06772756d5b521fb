"""The command line: arguments and output. What a command does is in the package that it imports when it runs."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from psyche import __version__
from psyche.cli import (
    audit_commands,
    bench_commands,
    config_commands,
    data_commands,
    join_commands,
    ledger_commands,
    model_commands,
    run_commands,
)
from psyche.cli.dashboard_command import dashboard
from psyche.errors import PsycheError

app = typer.Typer(
    help="LLM pretraining over permissionless, low-bandwidth nodes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version
        from importlib.util import find_spec
        from platform import python_version

        codecs = "native codecs" if find_spec("psyche._native") else "PyTorch codecs (no C++ build)"
        typer.echo(f"psyche {__version__}, Python {python_version()}, torch {version('torch')}, {codecs}")
        raise typer.Exit


@app.callback()
def psyche(
    version: Annotated[
        bool, typer.Option("--version", help="Print versions and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """LLM pretraining over permissionless, low-bandwidth nodes."""


app.command()(run_commands.demo)
app.command()(run_commands.run)
app.command()(join_commands.join)
app.command()(join_commands.leave)
app.command()(join_commands.doctor)
app.command()(run_commands.coordinator)
app.command()(run_commands.key)
app.command()(run_commands.invite)
app.command("eval")(model_commands.evaluate)
app.command()(model_commands.generate)
app.command()(model_commands.export)
app.command()(dashboard)
app.add_typer(config_commands.app, name="config")
app.add_typer(data_commands.app, name="data")
app.add_typer(ledger_commands.app, name="ledger")
app.add_typer(audit_commands.app, name="audit")
app.add_typer(bench_commands.app, name="bench")


def main() -> None:
    """Run the command line. A :class:`PsycheError` is printed as one sentence, without a traceback."""
    # A shell starts background jobs (`make demo &`) with SIGINT ignored; then Ctrl-C's signal would not stop them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app()
    except PsycheError as error:
        print(f"psyche: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("psyche: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout has closed it: `psyche … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
