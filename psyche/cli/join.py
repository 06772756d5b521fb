"""``psyche join | leave``: what a contributor types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from psyche.cli.options import Directory, Port

PRIVATE = "Private data (federated mode)"
"""The heading of these options in the help."""

ConfigFile = Annotated[
    Path | None, typer.Option(help="A file whose node: part holds this machine's settings.", show_default=False)
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda[:n].", show_default=False)]
Gpus = Annotated[
    str | None, typer.Option(help="GPUs that train: all, a number of them, or which, as 0,2.", show_default=False)
]
Threads = Annotated[int | None, typer.Option(help="CPU threads for training.", min=1, show_default=False)]
MaxUpload = Annotated[
    str | None,
    typer.Option(help="Most that others may fetch from here, such as 20mbit or 2.5MB a second.", show_default=False),
]
MaxDownload = Annotated[
    str | None, typer.Option(help="Most that is fetched from others, such as 100mbit.", show_default=False)
]
MaxGpuMemory = Annotated[
    str | None, typer.Option(help="Most to take of the GPU's memory, such as 6gb.", show_default=False)
]
Schedule = Annotated[
    str | None,
    typer.Option(help="Hours to take part in, local time: 22:00-07:00; several with commas.", show_default=False),
]
IdleOnly = Annotated[
    bool | None,
    typer.Option("--idle-only", help="Only while other programs leave CPUs and GPU alone.", show_default=False),
]
Payout = Annotated[
    str | None,
    typer.Option(
        help="Address that credits are to be paid to: 0x and 40 digits, as an Ethereum wallet shows it.",
        show_default=False,
    ),
]
PrivateText = Annotated[
    Path | None,
    typer.Option(
        help="Train on the text in this directory instead of the run's: of .jsonl files the field text, other "
        "files as they are. It stays here.",
        rich_help_panel=PRIVATE,
        show_default=False,
    ),
]
Epsilon = Annotated[
    float | None,
    typer.Option(
        help="The most that may be learned of the text in all rounds together; at 1 little, above 10 much. Once it "
        "is spent this node leaves.",
        rich_help_panel=PRIVATE,
        show_default=False,
    ),
]
Delta = Annotated[
    float | None,
    typer.Option(
        help="Probability that more is learned; 1e-6 if not given.", rich_help_panel=PRIVATE, show_default=False
    ),
]
NoiseMultiplier = Annotated[
    float | None,
    typer.Option(
        help="Noise over sensitivity; by default what makes the budget last for the whole run.",
        rich_help_panel=PRIVATE,
        show_default=False,
    ),
]


def join(
    invite: Annotated[str, typer.Argument(help="The string the run's operator gave you, or @FILE that holds it.")],
    directory: Directory = None,
    config: ConfigFile = None,
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
    private_data: PrivateText = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    noise_multiplier: NoiseMultiplier = None,
) -> None:
    """Join a run with this machine, and train until it ends.

    With --private-data, all that leaves this machine of its text is one clipped and noised pseudo-gradient a round.
    Together they are (ε, δ)-differentially private for the directory as a whole, and so for every document in it.
    No text is sent, and no hash, size or loss of it. Not hidden is that this node takes part, when, and how fast.
    The same text in another run, or from another --directory, has another budget: what can be learned adds up.

    Ctrl-C hands in what can be handed in within 5 seconds and leaves; a second one ends at once. `psyche leave`
    finishes the round first. The same line comes back.
    """
    from psyche.cli.process import read_invite, run_node
    from psyche.config import load_node, override_node

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
        typer.Argument(help="The node's directory; that of the one run joined from here.", show_default=False),
    ] = None,
    now: Annotated[
        bool, typer.Option("--now", help="Within seconds, as Ctrl-C: only what is done is handed in.")
    ] = False,
) -> None:
    """Ask a node that runs on this machine to leave, and wait until it has.

    It trains until the other members are done, hands in what it has, stays until the round is certified (it says how
    long that takes at most), says goodbye and ends. Ctrl-C here stops the waiting, not the leaving.
    """
    from psyche.cli.process import RUNS
    from psyche.network.invites import only_directory
    from psyche.processes.leave import ask_to_leave

    ask_to_leave(directory or only_directory(RUNS.expanduser()), typer.echo, now=now)
