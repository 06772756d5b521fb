"""``psyche ledger``: look at the certified chain that every node and coordinator keeps, and check it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # `psyche --help` imports this module: what is heavy is imported by the command that needs it
    from rich.table import Table

    from psyche.config import Manifest
    from psyche.roles.ledger_story import Round, Story

app = typer.Typer(help="Show and verify the certified chain of a run.", no_args_is_help=True)
Place = Annotated[
    Path, typer.Argument(help="A ledger file, or the directory of a node or a coordinator.", show_default=False)
]

_PREFIX = 8
"""Digits of a hash that a table shows."""


@app.command("show")
def show_command(
    path: Place,
    last: Annotated[
        int | None, typer.Option(help="Only so many rounds, the latest.", min=1, show_default=False)
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="Only this member: its PeerID, or how that ends.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Say what was certified: members, tokens, who was left out and why. Checks no signature; ``verify`` does."""
    from psyche.roles.ledger_story import story_of
    from psyche.state.ledger import Ledger

    with Ledger.read(_file(path)) as ledger:
        story = story_of(ledger, last=last, node=node)
    if json:
        import msgspec

        typer.echo(msgspec.json.encode(story))
        return
    from rich.console import Console

    console = Console()
    console.print(_rounds_table(story))
    console.print(_totals_table(story))
    for line in _notes(story):
        console.print(line, markup=False, highlight=False)


@app.command("verify")
def verify_command(
    path: Place,
    manifest: Annotated[
        Path | None,
        typer.Option(help="The run's manifest; by default the one in the ledger's directory.", show_default=False),
    ] = None,
) -> None:
    """Check every signature, vote and link against nothing but the run's manifest; the first bad round is named."""
    from psyche.config import MANIFEST
    from psyche.errors import PsycheError
    from psyche.protocol.ledger import BadLedger
    from psyche.roles.ledger_check import verify_ledger

    file = _file(path)
    try:
        found = verify_ledger(file, _manifest(manifest or file.parent / MANIFEST))
    except BadLedger as fault:
        raise PsycheError(f"{file} is not the history of the run: {fault}") from None
    missing = _spans((gap.start, gap.stop - 1) for gap in found.missing)
    typer.echo(
        f"sound: {found.rounds:,} certified rounds up to round {found.last:,}, {sum(found.tokens.values()):,} tokens "
        f"of {len(found.tokens):,} nodes, {found.reconfigurations:,} reconfigurations; "
        + (f"missing here: {missing}" if missing else "none is missing")
    )


def _file(path: Path) -> Path:
    from psyche.state.ledger import NAME

    return path / NAME if path.is_dir() else path


def _manifest(path: Path) -> Manifest:
    from psyche.config import Manifest
    from psyche.errors import PsycheError

    try:
        return Manifest.decode(path.read_bytes())
    except OSError as error:
        raise PsycheError(
            f"cannot read the run's manifest {path} ({error.strerror}): name it with --manifest; every node "
            "of the run has it in its directory"
        ) from None


# ------------------------------------------------------------------------------------- the tables


def _rounds_table(story: Story) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, title=f"run {story.run_id[:16]}…", title_justify="left")
    for heading in ("round", "accepted", "tokens"):
        table.add_column(heading, justify="right")
    table.add_column("record", no_wrap=True)
    table.add_column("state root", no_wrap=True)
    table.add_column("remarks")
    for round in story.rounds:
        accepted = [part.tokens for part in round.members if part.tokens is not None]
        table.add_row(
            f"{round.round:,}",
            f"{len(accepted)}/{len(round.members)}",
            f"{sum(accepted):,}",
            round.record[:_PREFIX],
            "unknown" if round.state_root is None else round.state_root[:_PREFIX],
            _remarks(round),
        )
    return table


def _remarks(round: Round) -> str:
    """Who was left out and why, who was outvoted, whose data are private, whether survivors alone closed the round."""
    from rich.markup import escape

    from psyche.telemetry.wording import clean, peer_name

    lines = ["reconfiguration"] if round.reconfiguration else []
    lines += [f"{peer_name(p.node)}: {clean(p.reason or 'no reason given')}" for p in round.members if p.tokens is None]
    lines += [f"{peer_name(part.node)}: outvoted on a result" for part in round.members if part.minority]
    if private := [peer_name(part.node) for part in round.members if part.private]:
        lines.append(f"private data, unaudited: {', '.join(private)}")
    return escape("\n".join(lines))


def _totals_table(story: Story) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from psyche.telemetry.wording import peer_name, size

    title = f"in all of {story.held:,} rounds"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("node", no_wrap=True)
    for heading in ("accepted", "tokens", "unaudited", "payloads"):
        table.add_column(heading, justify="right")
    for node, total in story.totals.items():
        unaudited = f"{total.unaudited:,}" if total.unaudited else ""
        rounds = f"{total.accepted:,}/{total.rounds:,}"
        table.add_row(peer_name(node), rounds, f"{total.tokens:,}", unaudited, size(total.payload_bytes))
    return table


def _notes(story: Story) -> Iterable[str]:
    if story.missing:
        yield f"missing here: {_spans(story.missing)}"
    if story.superseded:
        again = ", ".join(f"{round:,}" for round in sorted(set(story.superseded)))
        yield f"certified before with another record, and superseded: {again}"


def _spans(gaps: Iterable[tuple[int, int]]) -> str:
    """Rounds 1–4, 9."""
    found = [f"{first:,}" if first == last else f"{first:,}–{last:,}" for first, last in gaps]
    return f"round{'s' * (len(found) > 1 or any('–' in one for one in found))} {', '.join(found)}" if found else ""
