"""``psyche data``: prepare, verify and describe the token store of a configuration."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # `psyche --help` imports this module: what is heavy is imported by the command that needs it
    from psyche.data.prepare import Progress
    from psyche.data.store import TokenStore

app = typer.Typer(help="Prepare, verify and describe token stores.", no_args_is_help=True)
ConfigFile = Annotated[Path, typer.Argument(help="Configuration file (YAML) with a run: part.", show_default=False)]

STAGES = {
    "waiting": "waiting for another process that prepares this store",
    "tokenizer": "reading documents for the tokenizer",
    "tokens": "encoding documents",
}
LINE_EVERY = 5.0
"""Seconds between progress lines where there is no terminal."""


@app.command("prepare")
def prepare_command(config: ConfigFile) -> None:
    """Tokenise the configured corpus into a token store; goes on where it was stopped, and does nothing when done."""
    from psyche.config import load_config
    from psyche.data.prepare import prepare

    loaded = load_config(config)
    with progress_display() as report:
        store = prepare(loaded.run.data, loaded.node.cache, vocab_limit=loaded.run.model.vocab_size, progress=report)
    _describe(store)


@app.command("verify")
def verify_command(config: ConfigFile) -> None:
    """Hash every file of the store again; the first bad one is named."""
    store = _open(config)
    store.verify(lambda path: typer.echo(f"ok         {path.relative_to(store.path)}"))
    typer.echo(f"sound      {store.root.hex()}")


@app.command("info")
def info_command(config: ConfigFile) -> None:
    """Say where the store is and what is in it."""
    _describe(_open(config))


def _open(config: Path) -> TokenStore:
    from psyche.config import load_config
    from psyche.data.store import TokenStore, store_path

    loaded = load_config(config)
    return TokenStore.open(store_path(loaded.node.cache, loaded.run.data))


def _describe(store: TokenStore) -> None:
    typer.echo(f"store      {store.path}")
    typer.echo(f"root       {store.root.hex()}")
    for name, split in (("train", store.train), ("heldout", store.heldout)):
        tokens = len(split) * store.sequence_length
        typer.echo(f"{name:10} {len(split):,} sequences, {tokens:,} tokens, {len(split.shards)} shards")
    typer.echo(f"tokens     {store.index.dtype}, vocabulary {store.vocab_size:,}, sequences of {store.sequence_length}")


@contextmanager
def progress_display() -> Iterator[Callable[[Progress], None]]:
    """A live bar on a terminal, a line now and then elsewhere; both on stderr, so that stdout is the result."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda at: bar.update(task, description=_describe_stage(at), completed=at.documents, total=at.total)


def _lines() -> Callable[[Progress], None]:
    stage, said = "", 0.0

    def report(at: Progress) -> None:
        nonlocal stage, said
        now = time.monotonic()
        if at.stage != stage or now - said >= LINE_EVERY:
            stage, said = at.stage, now
            typer.echo(f"{_describe_stage(at)}: {at.documents:,}{f' of {at.total:,}' if at.total else ''}", err=True)

    return report


def _describe_stage(at: Progress) -> str:
    return STAGES[at.stage] + (f" ({at.tokens:,} tokens)" if at.tokens else "")
