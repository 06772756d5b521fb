"""``psyche dashboard``: the W&B workspace of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from psyche.cli.options import NodeConfig
from psyche.errors import PsycheError

if TYPE_CHECKING:
    from psyche.telemetry.events import RunStarted


def dashboard(
    run_dir: Annotated[
        Path, typer.Argument(help="Directory of a run on this machine, or its event log.", show_default=False)
    ],
    config: NodeConfig = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write the layout to this JSON file instead of creating it in W&B.", show_default=False),
    ] = None,
) -> None:
    """Create the W&B dashboard of a run; without a W&B key, write its layout to a JSON file in the run's directory.

    node.wandb in --config names the project and entity.
    """
    from psyche.config import load_node

    started = _started(run_dir)
    wandb = load_node(config).wandb
    from psyche.telemetry import wandb_workspace
    from psyche.telemetry.wandb_run import resolve_mode

    online = output is None and resolve_mode(wandb) == "online"
    entity = wandb.entity or (_default_entity() if online else "entity")
    fallback = output or (run_dir if run_dir.is_dir() else run_dir.parent) / "wandb-workspace.json"
    workspace = wandb_workspace.build(entity, wandb.project, started.run_id)
    try:
        place = wandb_workspace.save(workspace, fallback, online=online)
    except OSError as error:
        raise PsycheError(f"cannot write {fallback}: {error.strerror}") from None
    except Exception as error:  # wandb raises many types
        raise PsycheError(f"W&B refused the dashboard of {entity}/{wandb.project}: {error}") from None
    if online:
        typer.echo(f"dashboard of {started.name}: {place}")
    else:
        typer.echo(f"dashboard layout of {started.name}: {place} (not in W&B: no key is configured; run `wandb login`)")


def _started(run_dir: Path) -> RunStarted:
    from psyche.telemetry.event_log import LOG_NAME, read_events
    from psyche.telemetry.events import RunStarted

    logs = sorted(run_dir.rglob(LOG_NAME)) if run_dir.is_dir() else [run_dir]
    for log in logs:
        for event in read_events(log):
            if isinstance(event, RunStarted):
                return event
    raise PsycheError(f"{run_dir} holds no event log of a run: give the directory of a coordinator or node")


def _default_entity() -> str:
    import wandb

    try:
        entity = wandb.Api().default_entity
    except Exception as error:
        raise PsycheError(
            f"W&B cannot be reached ({error}); with --output FILE the layout is written instead"
        ) from None
    if not entity:
        raise PsycheError("the W&B key has no default entity; set node.wandb.entity in the configuration")
    return str(entity)
