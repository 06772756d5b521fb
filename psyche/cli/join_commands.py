"""``psyche join | leave | doctor``: the commands of a contributor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from psyche.cli.options import Directory, Json, NodeConfig, Port

if TYPE_CHECKING:  # `psyche --help` imports this module; heavy imports are made by the command that needs them
    from psyche.tools.checks import Finding

PRIVATE = "Private data (federated mode)"
"""Heading of these options in the help."""
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}

Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", show_default=False)]
Gpus = Annotated[
    str | None, typer.Option(help="GPUs to train on: all, a number, or indices such as 0,2.", show_default=False)
]
Threads = Annotated[int | None, typer.Option(help="CPU threads for training.", min=1, show_default=False)]
MaxUpload = Annotated[
    str | None, typer.Option(help="Upload limit, such as 20mbit or 2.5MB (per second).", show_default=False)
]
MaxDownload = Annotated[str | None, typer.Option(help="Download limit, such as 100mbit.", show_default=False)]
MaxGpuMemory = Annotated[str | None, typer.Option(help="GPU memory limit, such as 6gb.", show_default=False)]
Schedule = Annotated[
    str | None,
    typer.Option(help="Train only during these hours, local time: 22:00-07:00,12:00-13:30.", show_default=False),
]
IdleOnly = Annotated[
    bool | None,
    typer.Option("--idle-only", help="Train only while no other program uses the CPUs or the GPU.", show_default=False),
]
Payout = Annotated[
    str | None,
    typer.Option(help="Ethereum address (0x…) that this node's credits are paid to.", show_default=False),
]
PrivateData = Annotated[
    Path | None,
    typer.Option(
        help="Train on the text in this directory instead of the run's: the text field of .jsonl lines, other files "
        "whole. The text never leaves this machine.",
        rich_help_panel=PRIVATE,
        show_default=False,
    ),
]
Epsilon = Annotated[
    float | None,
    typer.Option(
        help="Privacy budget ε for the whole run: 1 is strict, above 10 is weak. The node leaves once it is spent.",
        rich_help_panel=PRIVATE,
        show_default=False,
    ),
]
Delta = Annotated[
    float | None,
    typer.Option(
        help="Probability δ that the ε bound does not hold. Default: 1e-6.", rich_help_panel=PRIVATE, show_default=False
    ),
]
NoiseMultiplier = Annotated[
    float | None,
    typer.Option(
        help="Noise standard deviation over sensitivity. Default: the least that keeps ε within budget for the whole "
        "run.",
        rich_help_panel=PRIVATE,
        show_default=False,
    ),
]


def join(
    invite: Annotated[str, typer.Argument(help="The invite from the run's operator, or @FILE to read it from.")],
    directory: Directory = None,
    config: NodeConfig = None,
    device: Device = None,
    gpus: Gpus = None,
    threads: Threads = None,
    port: Port = None,
    max_upload: MaxUpload = None,
    max_download: MaxDownload = None,
    max_gpu_memory: MaxGpuMemory = None,
    schedule: Schedule = None,
    idle_only: IdleOnly = None,
    payout: Payout = None,
    private_data: PrivateData = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    noise_multiplier: NoiseMultiplier = None,
) -> None:
    """Join a run with this machine and train until it ends.

    Ctrl-C submits finished work (up to 5 s), then exits; a second Ctrl-C exits immediately. `psyche leave` finishes the
    current round first. Run the same command to rejoin.

    With --private-data, all that leaves this machine of the text is one clipped, noised pseudo-gradient per round; all
    of them together are (ε, δ)-differentially private for the directory as a whole. Text, hashes, sizes and losses are
    never sent. Others do see that this node takes part, when, and how fast. Each run and each --directory has its own
    budget: using the same text in several adds up.
    """
    from psyche.config import load_node, override_node
    from psyche.processes.foreground import read_invite, run_node

    settings = override_node(
        load_node(config),
        device=device,
        gpus=gpus,
        threads=threads,
        port=port,
        max_upload=max_upload,
        max_download=max_download,
        max_gpu_memory=max_gpu_memory,
        schedule=schedule,
        idle_only=idle_only,
        payout=payout,
        private={"path": private_data, "epsilon": epsilon, "delta": delta, "noise_multiplier": noise_multiplier},
    )
    run_node(read_invite(invite), settings, directory)


def leave(
    directory: Annotated[
        Path | None,
        typer.Argument(help="The node's directory. Default: that of the only run joined here.", show_default=False),
    ] = None,
    now: Annotated[
        bool, typer.Option("--now", help="Leave within seconds, as Ctrl-C does; unfinished work is dropped.")
    ] = False,
) -> None:
    """Ask the node running in DIRECTORY to leave, and wait until it has.

    The node trains until the other members are done with the round, submits its work, waits until the round is
    certified (it prints the longest this can take) and exits. Ctrl-C here stops only the waiting, not the leaving.
    """
    from psyche.network.invite import only_run_directory
    from psyche.processes.foreground import RUNS
    from psyche.processes.leave import ask_to_leave

    ask_to_leave(directory or only_run_directory(RUNS.expanduser()), typer.echo, now=now)


def doctor(
    invite: Annotated[
        str | None,
        typer.Argument(help="A run's invite, to check what that run needs as well.", show_default=False),
    ] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Directory that `psyche join` would use.", show_default=False)
    ] = None,
    config: NodeConfig = None,
    port: Port = None,
    json: Json = False,
) -> None:
    """Check this machine: versions, port, clock, reachability, disk, memory, training and line speed.

    Exit code 1 if a check fails.
    """
    import asyncio

    from psyche.config import load_node, override_node
    from psyche.processes.foreground import RUNS, read_invite, run_directory

    parsed = None if invite is None else read_invite(invite)
    settings = override_node(load_node(config), port=port)
    where = directory or (RUNS.expanduser() if parsed is None else run_directory(parsed))
    from psyche.tools.doctor import examine

    findings: list[Finding] = []
    asyncio.run(examine(parsed, settings, where, findings.append))
    if json:
        from dataclasses import asdict
        from json import dumps

        typer.echo(dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print_findings(findings)
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(1)


def _print_findings(findings: list[Finding]) -> None:
    """Print a table. Fixes wrap on a narrow terminal; they are never cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from psyche.telemetry.formatting import clean

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for finding in findings:
        text = Text(clean(finding.found, 400))
        if finding.fix:
            text.append(f"\n→ {clean(finding.fix, 600)}", style="bold")
        table.add_row(Text(finding.level, style=STYLES[finding.level]), finding.check, text)
    Console().print(table)
