"""Where a ledger and its manifest are, for the commands that read them; and what else these have in common."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # `psyche --help` imports this module: what is heavy is imported by the command that needs it
    from psyche.config import Manifest
    from psyche.ledger.verify import Summary

Place = Annotated[
    Path, typer.Argument(help="A ledger file, or the directory of a node or a coordinator.", show_default=False)
]
ManifestFile = Annotated[
    Path | None,
    typer.Option(
        "--manifest", help="The run's manifest; by default the one in the ledger's directory.", show_default=False
    ),
]


def ledger_file(path: Path) -> Path:
    """The ledger at ``path``, or in it."""
    from psyche.ledger.store import NAME

    return path / NAME if path.is_dir() else path


def manifest_of(path: Path | None, ledger: Path) -> Manifest:
    """The manifest at ``path``, or beside ``ledger``. Raises :class:`PsycheError` where it cannot be read."""
    from psyche.config import MANIFEST, Manifest
    from psyche.errors import PsycheError

    path = path or ledger.parent / MANIFEST
    try:
        return Manifest.decode(path.read_bytes())
    except OSError as error:
        raise PsycheError(
            f"cannot read the run's manifest {path} ({error.strerror}): name it with --manifest; every node "
            "of the run has it in its directory"
        ) from None


def checked(ledger: Path, manifest: Manifest) -> Summary:
    """What a ledger holds, once all of it is proven; with a bar while that takes. Raises :class:`PsycheError`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from psyche.errors import PsycheError
    from psyche.ledger.verify import verify_ledger
    from psyche.protocol.ledger import BadLedger

    console = Console(stderr=True)
    columns = (TextColumn("rounds checked"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        try:
            return verify_ledger(
                ledger, manifest, progress=lambda done, total: bar.update(task, completed=done, total=total)
            )
        except BadLedger as fault:
            raise PsycheError(f"{ledger} is not the history of the run: {fault}") from None


def spans(gaps: Iterable[tuple[int, int]]) -> str:
    """Rounds 1–4, 9; nothing where there are none."""
    found = [f"{first:,}" if first == last else f"{first:,}–{last:,}" for first, last in gaps]
    return f"round{'s' * (len(found) > 1 or any('–' in one for one in found))} {', '.join(found)}" if found else ""
