"""``psyche data``: prepare, verify and describe the token store of a configuration."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # `psyche --help` imports this module: what is heavy is imported by the command that needs it
    from rich.progress import TaskID

    from psyche.data.prepare import Progress
    from psyche.data.store import TokenStore

app = typer.Typer(help="Prepare, verify and describe token stores.", no_args_is_help=True)
ConfigFile = Annotated[Path, typer.Argument(help="Configuration file (YAML) with a run: part.", show_default=False)]

STAGES = {
    "waiting": "waiting for another process that prepares this store",
    "tokenizer": "reading for the tokenizer",
    "merges": "training the tokenizer",
    "tokens": "encoding",
    "shuffle": "shuffling",
}
LINE_EVERY = 5.0
"""Seconds between progress lines where there is no terminal."""


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
        yield _lines()
        return
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    class Polled(Bars):
        """Looks at the last report when it draws: a report comes with every document, and has to cost nothing."""

        latest: Progress | None = None

        def get_renderables(self) -> Iterable[RenderableType]:
            if self.latest is not None:
                at = self.latest
                for stage, task in tasks.items():
                    self.update(task, visible=stage == at.stage)
                self.start_task(tasks[at.stage])
                amounts = _amounts(at, self.tasks[tasks[at.stage]].elapsed or 0.0)
                self.update(tasks[at.stage], completed=at.done, total=at.total, count=_count(at), amounts=amounts)
            return super().get_renderables()

    texts = [TextColumn(f"{{task.{name}}}") for name in ("description", "fields[count]", "fields[amounts]")]
    columns = (texts[0], BarColumn(bar_width=12), *texts[1:], TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Polled(*columns, console=Console(stderr=True), transient=True) as bars:
        for stage, about in STAGES.items():  # one each, so that its times are its own
            tasks[stage] = bars.add_task(about, start=False, total=None, visible=False, count="", amounts="")
        yield lambda at: setattr(bars, "latest", at)


def _lines() -> Callable[[Progress], None]:
    stage, began, said = "", 0.0, 0.0

    def report(at: Progress) -> None:
        nonlocal stage, began, said
        now = time.monotonic()
        if at.stage != stage:
            stage, began = at.stage, now
        elif now - said < LINE_EVERY:
            return
        said = now
        typer.echo(" ".join(filter(None, (f"{STAGES[stage]}:", _count(at), _amounts(at, now - began)))), err=True)

    return report


def _count(at: Progress) -> str:
    return f"{at.done:,}{f' of {at.total:,}' if at.total else ''}" if at.done else ""


def _amounts(at: Progress, seconds: float) -> str:
    """Tokens, speed and text of a stage that has run for so long, where there are any yet."""
    from psyche.telemetry.formatting import amount

    if not at.tokens:
        return ""
    speed = f" {amount(at.tokens / seconds)}/s" if seconds > 1 else ""
    return f"{amount(at.tokens)} tokens{speed}{f' {at.bytes / 1e6:,.0f} MB' if at.bytes else ''}"
