"""The command line. Commands only: what they do lives in the packages they import, when they run."""

from __future__ import annotations

import os
import signal
import sys

import typer

from psyche.cli import audit, bench, config, data, join, ledger, model, runs
from psyche.cli.dashboard import dashboard
from psyche.cli.doctor import doctor
from psyche.errors import PsycheError

app = typer.Typer(
    help="LLM pretraining over permissionless, low-bandwidth nodes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(runs.demo)
app.command()(runs.run)
app.command()(join.join)
app.command()(join.leave)
app.command()(runs.coordinator)
app.command()(runs.key)
app.command()(runs.invite)
app.command()(doctor)
app.command()(runs.export)
app.command("eval")(model.evaluate)
app.command()(model.generate)
app.command()(dashboard)
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.add_typer(ledger.app, name="ledger")
app.add_typer(audit.app, name="audit")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point: a :class:`PsycheError` is one sentence for the person concerned, never a traceback."""
    # A shell starts its background jobs (`make demo &`) with SIGINT ignored; then nobody could stop us politely.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app()
    except PsycheError as error:
        print(f"psyche: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("psyche: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away: `psyche … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
