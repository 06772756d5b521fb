"""``psyche data``: prepare, verify and describe the token store of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from psyche.cli.options import RunConfig

if TYPE_CHECKING:  # `psyche --help` imports this module; heavy imports are made by the command that needs them
    from psyche.data.token_store import TokenStore

app = typer.Typer(help="Prepare, verify and describe token stores.", no_args_is_help=True)


@app.command("prepare")
def prepare_command(config: RunConfig) -> None:
    """Tokenise the configured corpus into a token store. Resumes where it was interrupted; does nothing when done."""
    from psyche.config import load_config
    from psyche.data.prepare import prepare
    from psyche.data.progress_display import progress_display

    loaded = load_config(config)
    run, cache = loaded.run, loaded.node.cache
    try:
        with progress_display() as report:
            store = prepare(run.data, cache, vocab_limit=run.model.vocab_size, progress=report)
    except KeyboardInterrupt:
        typer.echo("psyche: interrupted; run the same command to resume", err=True)
        raise typer.Exit(130) from None
    _describe(store)


@app.command("verify")
def verify_command(config: RunConfig) -> None:
    """Check the hash of every file of the store, and name the first that does not match."""
    store = _open(config)
    store.verify(lambda path: typer.echo(f"ok         {path.relative_to(store.path)}"))
    typer.echo(f"verified   {store.root.hex()}")


@app.command("info")
def info_command(config: RunConfig) -> None:
    """Print where the store is and what it holds."""
    _describe(_open(config))


def _open(config: Path) -> TokenStore:
    from psyche.config import load_config
    from psyche.data.token_store import TokenStore, store_path

    loaded = load_config(config)
    return TokenStore.open(store_path(loaded.node.cache, loaded.run.data))


def _describe(store: TokenStore) -> None:
    typer.echo(f"store      {store.path}")
    typer.echo(f"root       {store.root.hex()}")
    for name, split in (("train", store.train), ("heldout", store.heldout)):
        tokens = len(split) * store.sequence_length
        typer.echo(f"{name:10} {len(split):,} sequences, {tokens:,} tokens, {len(split.shards)} shards")
    typer.echo(f"tokens     {store.index.dtype}, vocabulary {store.vocab_size:,}, sequences of {store.sequence_length}")
