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
    "shuffle": "shuffling sequences",
}
LINE_EVERY = 5.0
"""Seconds between progress lines where there is no terminal."""
DRAW_EVERY = 0.1
"""Seconds between changes of the bar: a report comes with every document."""


@app.command("prepare")
def prepare_command(config: ConfigFile) -> None:
    """Tokenise the configured corpus into a token store; goes on where it was stopped, and does nothing when done."""
    from psyche.config import load_config
    from psyche.data.prepare import prepare

    loaded = load_config(config)
    run, cache = loaded.run, loaded.node.cache
    try:
        with progress_display() as report:
            store = prepare(run.data, cache, vocab_limit=run.model.vocab_size, progress=report)
    except KeyboardInterrupt:
        typer.echo("psyche: stopped; the same command goes on from there", err=True)
        raise typer.Exit(130) from None
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
        yield _every(LINE_EVERY, lambda text, at: typer.echo(f"{text}: {_count(at)}", err=True))
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    about, count = TextColumn("{task.description}"), TextColumn("{task.fields[count]}")
    columns = (about, BarColumn(), count, TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def draw(text: str, at: Progress) -> None:
            if at.stage not in tasks:  # one of its own, so that its times are those of the stage
                for shown in tasks.values():
                    bar.update(shown, visible=False)
                tasks[at.stage] = bar.add_task("", total=None, count="")
            bar.update(tasks[at.stage], description=text, completed=at.done, total=at.total, count=_count(at))

        yield _every(DRAW_EVERY, draw)


def _every(seconds: float, show: Callable[[str, Progress], None]) -> Callable[[Progress], None]:
    """``show`` a report and what it is about, when its stage is new and every so many seconds."""
    stage, began, said = "", 0.0, 0.0

    def report(at: Progress) -> None:
        nonlocal stage, began, said
        now = time.monotonic()
        if at.stage != stage:
            stage, began = at.stage, now
        elif now - said < seconds:
            return
        said = now
        show(STAGES[stage] + _amounts(at, now - began), at)

    return report


def _amounts(at: Progress, seconds: float) -> str:
    """Tokens, text and speed of a stage that has run for so long, where there are any yet."""
    parts = [f"{at.tokens:,} tokens"] if at.tokens else []
    if at.tokens and seconds > 1:
        parts.append(f"{at.tokens / seconds:,.0f} a second")
    if at.bytes:
        parts.append(f"{at.bytes / 1e6:,.1f} MB of text")
    return f" ({', '.join(parts)})" if parts else ""


def _count(at: Progress) -> str:
    return f"{at.done:,}{f' of {at.total:,}' if at.total else ''}"
