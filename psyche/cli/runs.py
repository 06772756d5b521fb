"""``psyche demo | run | coordinator | key | invite | export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from psyche.cli.options import Directory, Port
from psyche.errors import PsycheError

DEMO = Path("configs/demo.yaml")

ConfigFile = Annotated[Path, typer.Argument(help="Configuration file (YAML).", show_default=False)]


def demo(
    peers: Annotated[int | None, typer.Option(help="Local nodes; as many as the run waits for.", min=1)] = None,
    config: Annotated[Path, typer.Option(help="Configuration file.")] = DEMO,
    directory: Annotated[Path, typer.Option(help="Where the run's files go; emptied first.")] = Path("runs/demo"),
) -> None:
    """Train a small language model here: a coordinator and four nodes, as they would be anywhere else."""
    from psyche.processes.local import run_locally

    run_locally(config, peers, directory, fresh=True, report=True)


def run(
    config: ConfigFile,
    peers: Annotated[int, typer.Option(help="Nodes to run on this machine besides the coordinator.", min=0)] = 1,
    directory: Directory = None,
) -> None:
    """Launch a run: a coordinator and local nodes, with an invite for everybody else. Started again, it goes on."""
    from psyche.config import load_config
    from psyche.processes.local import run_locally

    where = directory or Path("runs") / load_config(config).run.name
    run_locally(config, peers, where, fresh=False, report=True)


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
    from psyche.network.invites import invite_of, only_directory

    typer.echo(invite_of(directory or only_directory(RUNS.expanduser())).encode())


def export(
    directory: Annotated[Path, typer.Argument(help="A node's directory, with a checkpoint in it.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Where the model and its tokenizer go.", show_default=False)],
) -> None:
    """Write a node's outer parameters as a directory that transformers loads."""
    from psyche.tools.export import export_node

    rounds = export_node(directory, output)
    typer.echo(
        f"{output}: the model after round {rounds}; AutoModelForCausalLM.from_pretrained({str(output)!r}) loads it"
    )
