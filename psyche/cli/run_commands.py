"""``psyche demo | run | coordinator | key | invite``: the commands of an operator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from psyche.cli.options import Directory, Port, RunConfig
from psyche.errors import PsycheError

DEMO = Path("configs/demo.yaml")


def demo(
    peers: Annotated[
        int | None, typer.Option(help="Local nodes. Default: as many as the run needs to start.", min=1)
    ] = None,
    config: Annotated[Path, typer.Option(help="Configuration file (YAML).")] = DEMO,
    directory: Annotated[Path, typer.Option(help="Directory for the run's files; emptied first.")] = Path("runs/demo"),
) -> None:
    """Train a small language model on this machine, with a coordinator and four nodes in processes of their own."""
    from psyche.processes.local_run import run_locally

    run_locally(config, peers, directory, fresh=True, report=True)


def run(
    config: RunConfig,
    peers: Annotated[int, typer.Option(help="Local nodes to run besides the coordinator.", min=0)] = 1,
    directory: Directory = None,
) -> None:
    """Launch a run with a coordinator and local nodes, and print an invite for other machines.

    Run the same command to resume it.
    """
    from psyche.config import load_config
    from psyche.processes.local_run import run_locally

    where = directory or Path("runs") / load_config(config).run.name
    run_locally(config, peers, where, fresh=False, report=True)


def coordinator(
    config: Annotated[
        Path | None, typer.Argument(help="Configuration file (YAML) of the run to launch.", show_default=False)
    ] = None,
    standby: Annotated[
        str | None,
        typer.Option(
            help="Stand by for the run of this invite (or @FILE) and take over when its coordinator is gone. The run's "
            "configuration must list this directory's key under run.standbys.",
            metavar="INVITE",
            show_default=False,
        ),
    ] = None,
    directory: Directory = None,
    port: Port = None,
) -> None:
    """Launch and lead a run, or stand by for one (--standby). A coordinator trains nothing."""
    from psyche.config import load_config, load_node, override_node
    from psyche.processes.foreground import read_invite, run_coordinator, run_directory, run_standby

    if standby is not None:
        invite = read_invite(standby)
        settings = override_node(load_node(config), port=port)
        run_standby(invite, settings, directory or run_directory(invite))
        return
    if config is None:
        raise PsycheError("psyche coordinator needs the CONFIG of a run to launch, or --standby INVITE to back one up")
    loaded = load_config(config)
    launched = loaded.model_copy(update={"node": override_node(loaded.node, port=port)})
    run_coordinator(launched, directory or Path("runs") / loaded.run.name / "coordinator")


def key(
    directory: Annotated[Path, typer.Argument(help="A node's or coordinator's directory.", show_default=False)],
) -> None:
    """Print the PeerID of a directory, for run.standbys of a configuration. Creates the key if there is none."""
    from psyche.network.identity import IDENTITY, Identity

    typer.echo(Identity.load_or_create(directory / IDENTITY).peer_id)


def invite(
    directory: Annotated[
        Path | None,
        typer.Argument(
            help="A node's or coordinator's directory. Default: that of the only run joined here.", show_default=False
        ),
    ] = None,
) -> None:
    """Print an invite to the run: this node's address and those of the peers it knows. Any member can invite."""
    from psyche.network.invite import invite_from, only_run_directory
    from psyche.processes.foreground import RUNS

    typer.echo(invite_from(directory or only_run_directory(RUNS.expanduser())).encode())
