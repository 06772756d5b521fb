"""``psyche demo | run | join | leave | coordinator | key | invite | export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from psyche.errors import PsycheError

DEMO = Path("configs/demo.yaml")

MaxUpload = Annotated[
    str | None,
    typer.Option(help="Most that others may fetch from here, such as 20mbit or 2.5MB a second.", show_default=False),
]
MaxDownload = Annotated[
    str | None,
    typer.Option(help="Most that is fetched from others, such as 100mbit.", show_default=False),
]
Port = Annotated[
    int | None,
    typer.Option(
        help="TCP port to listen at; by default that of last time, at first a free one.",
        min=1,
        max=65535,
        show_default=False,
    ),
]
ConfigFile = Annotated[Path, typer.Argument(help="Configuration file (YAML).", show_default=False)]
PRIVATE = "Private data (federated mode)"
"""The heading of these options in the help."""
Directory = Annotated[
    Path | None,
    typer.Option(help="Where this process keeps its key, log and checkpoints.", show_default=False),
]


def demo(
    peers: Annotated[int | None, typer.Option(help="Local nodes; as many as the run waits for.", min=1)] = None,
    config: Annotated[Path, typer.Option(help="Configuration file.")] = DEMO,
    directory: Annotated[Path, typer.Option(help="Where the run's files go; emptied first.")] = Path("runs/demo"),
) -> None:
    """Train a small language model here: a coordinator and four nodes, as they would be anywhere else."""
    from psyche.roles.local import run_locally

    run_locally(config, peers, directory, fresh=True, report=True)


def run(
    config: ConfigFile,
    peers: Annotated[int, typer.Option(help="Nodes to run on this machine besides the coordinator.", min=0)] = 1,
    directory: Directory = None,
) -> None:
    """Launch a run: a coordinator and local nodes, with an invite for everybody else. Started again, it goes on."""
    from psyche.config import load_config
    from psyche.roles.local import run_locally

    where = directory or Path("runs") / load_config(config).run.name
    run_locally(config, peers, where, fresh=False, report=True)


def join(
    invite: Annotated[str, typer.Argument(help="The string the run's operator gave you, or @FILE that holds it.")],
    directory: Directory = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A file whose node: part holds this machine's settings.", show_default=False),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda[:n].", show_default=False)] = None,
    gpus: Annotated[
        str | None,
        typer.Option(help="GPUs that train: all, a number of them, or which, as 0,2.", show_default=False),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads for training.", min=1, show_default=False)] = None,
    port: Port = None,
    max_upload: MaxUpload = None,
    max_download: MaxDownload = None,
    max_gpu_memory: Annotated[
        str | None, typer.Option(help="Most to take of the GPU's memory, such as 6gb.", show_default=False)
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="Hours to take part in, local time: 22:00-07:00; several with commas.", show_default=False),
    ] = None,
    idle_only: Annotated[
        bool | None,
        typer.Option("--idle-only", help="Only while other programs leave CPUs and GPU alone.", show_default=False),
    ] = None,
    private_data: Annotated[
        Path | None,
        typer.Option(
            help="Train on the text in this directory instead of the run's: of .jsonl files the field text, other "
            "files as they are. It stays here.",
            rich_help_panel=PRIVATE,
            show_default=False,
        ),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="The most that may be learned of the text in all rounds together; at 1 little, above 10 much. Once it "
            "is spent this node leaves.",
            rich_help_panel=PRIVATE,
            show_default=False,
        ),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(
            help="Probability that more is learned; 1e-6 if not given.", rich_help_panel=PRIVATE, show_default=False
        ),
    ] = None,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(
            help="Noise over sensitivity; by default what makes the budget last for the whole run.",
            rich_help_panel=PRIVATE,
            show_default=False,
        ),
    ] = None,
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
        private={
            "path": private_data,
            "epsilon": epsilon,
            "delta": delta,
            "noise_multiplier": noise_multiplier,
        },
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
    from psyche.roles.farewell import ask_to_leave
    from psyche.roles.inviting import only_directory

    ask_to_leave(directory or only_directory(RUNS.expanduser()), typer.echo, now=now)


def coordinator(
    config: Annotated[
        Path | None, typer.Argument(help="Configuration file (YAML) of the run to launch.", show_default=False)
    ] = None,
    standby: Annotated[
        str | None,
        typer.Option(
            help="Instead of launching a run, stand by for the one of this invite (or @FILE) and take over when its "
            "coordinator is gone. The run's configuration names this directory's key under run.standbys.",
            metavar="INVITE",
            show_default=False,
        ),
    ] = None,
    directory: Directory = None,
    port: Port = None,
) -> None:
    """Launch a run and lead it, or stand by for one (--standby). Trains nothing itself."""
    from psyche.cli.process import home_of, read_invite, run_coordinator, run_standby
    from psyche.config import load_config, load_node, override_node

    if standby is not None:
        invite = read_invite(standby)
        settings = override_node(load_node(config), port=port)
        run_standby(invite, settings, directory or home_of(invite))
        return
    if config is None:
        raise PsycheError("psyche coordinator needs the CONFIG of a run to launch, or --standby INVITE to back one up")
    loaded = load_config(config)
    launched = loaded.model_copy(update={"node": override_node(loaded.node, port=port)})
    run_coordinator(launched, directory or Path("runs") / loaded.run.name / "coordinator")


def key(
    directory: Annotated[Path, typer.Argument(help="A node's or coordinator's directory.", show_default=False)],
) -> None:
    """Print the PeerID of a directory, whose key is made if there is none: for run.standbys of a configuration."""
    from psyche.network.identity import IDENTITY, Identity

    typer.echo(Identity.load_or_create(directory / IDENTITY).peer_id)


def invite(
    directory: Annotated[
        Path | None,
        typer.Argument(help="A node's or coordinator's directory; the one run joined from here.", show_default=False),
    ] = None,
) -> None:
    """Print an invite that holds this node's address and those of the peers it knows. Any member can invite."""
    from psyche.cli.process import RUNS
    from psyche.roles.inviting import invite_of, only_directory

    typer.echo(invite_of(directory or only_directory(RUNS.expanduser())).encode())


def export(
    directory: Annotated[Path, typer.Argument(help="A node's directory, with a checkpoint in it.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Where the model and its tokenizer go.", show_default=False)],
) -> None:
    """Write a node's outer parameters as a directory that transformers loads."""
    from psyche.roles.export import export_node

    rounds = export_node(directory, output)
    typer.echo(
        f"{output}: the model after round {rounds}; AutoModelForCausalLM.from_pretrained({str(output)!r}) loads it"
    )
