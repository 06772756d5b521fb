"""Arguments and options that several commands share, and reading the files that they name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # `psyche --help` imports this module; heavy imports are made by the command that needs them
    from psyche.config import Manifest
    from psyche.ledger.verify import Summary

Port = Annotated[
    int | None,
    typer.Option(
        help="TCP port to listen on. Default: the port of the last start, or any free port.",
        min=1,
        max=65535,
        show_default=False,
    ),
]
Directory = Annotated[
    Path | None,
    typer.Option(help="Directory for this process's key, log and checkpoints.", show_default=False),
]
NodeConfig = Annotated[
    Path | None, typer.Option(help="YAML file whose node: section configures this machine.", show_default=False)
]
RunConfig = Annotated[Path, typer.Argument(help="Configuration file (YAML) with a run: section.", show_default=False)]
LedgerPath = Annotated[
    Path, typer.Argument(help="A ledger file, or the directory of a node or coordinator.", show_default=False)
]
ManifestPath = Annotated[
    Path | None,
    typer.Option(
        "--manifest", help="The run's manifest. Default: the one in the ledger's directory.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def ledger_file(path: Path) -> Path:
    """Return the ledger at ``path``, or in the directory ``path``."""
    from psyche.ledger.store import NAME

    return path / NAME if path.is_dir() else path


def read_manifest(path: Path | None, ledger: Path) -> Manifest:
    """Read the manifest at ``path``, or the one beside ``ledger``. Raises :class:`PsycheError`."""
    from psyche.config import MANIFEST, Manifest
    from psyche.errors import PsycheError

    path = path or ledger.parent / MANIFEST
    try:
        return Manifest.decode(path.read_bytes())
    except OSError as error:
        raise PsycheError(
            f"cannot read the run's manifest {path} ({error.strerror}): give its path with --manifest; every node of "
            "the run has it in its directory"
        ) from None


def verified(ledger: Path, manifest: Manifest) -> Summary:
    """Verify the whole ledger, with a progress bar on a terminal. Raises :class:`PsycheError`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from psyche.errors import PsycheError
    from psyche.ledger.verify import verify_ledger
    from psyche.protocol.chain import BadLedger

    console = Console(stderr=True)
    columns = (TextColumn("rounds verified"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        try:
            return verify_ledger(
                ledger, manifest, progress=lambda done, total: bar.update(task, completed=done, total=total)
            )
        except BadLedger as fault:
            raise PsycheError(f"{ledger} is not a valid ledger of this run: {fault}") from None


def round_ranges(gaps: Iterable[tuple[int, int]]) -> str:
    """Format inclusive ranges as ``rounds 1–4, 9``; empty where there are none."""
    found = [f"{first:,}" if first == last else f"{first:,}–{last:,}" for first, last in gaps]
    return f"round{'s' * (len(found) > 1 or any('–' in one for one in found))} {', '.join(found)}" if found else ""
