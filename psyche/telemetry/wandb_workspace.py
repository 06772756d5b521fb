"""The W&B workspace of a run, as code.

The workspace is built here and saved to W&B, or its layout written as JSON where no key is configured. Which
metrics there are is :mod:`psyche.telemetry.metrics`' business. Importing this module imports wandb-workspaces.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces

from psyche.telemetry import metrics


def build(entity: str, project: str, group: str) -> workspaces.Workspace:
    """Return the workspace of one training run. ``group`` is the run id in hex, under which all its W&B runs are
    grouped."""
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=f"psyche {group[:8]}",
        sections=[_section(name) for name in get_args(metrics.Section)],
        settings=workspaces.WorkspaceSettings(x_axis=metrics.OUTER_STEP),
        runset_settings=workspaces.RunsetSettings(filters=[workspaces.Metric("Group") == group]),
    )


def layout(workspace: workspaces.Workspace) -> str:
    """Return the workspace as the JSON that W&B stores."""
    # wandb-workspaces has no public export; this is what its own save() sends.
    view = workspace._to_model()
    return json.dumps(view.model_dump(mode="json", by_alias=True, exclude_none=True), indent=2) + "\n"


def save(workspace: workspaces.Workspace, fallback: Path, *, online: bool) -> str:
    """Save to W&B if ``online``, else write the layout to ``fallback``; returns the URL or the path it is at.

    Raises what wandb raises where the server refuses, and :class:`OSError` where the file cannot be written.
    """
    if online:
        return str(workspace.save().url)
    fallback.write_text(layout(workspace), encoding="utf-8")
    return str(fallback)


def _section(name: metrics.Section) -> workspaces.Section:
    panels: dict[str, list[metrics.Plot]] = {}
    for plot in metrics.PLOTS:
        if plot.section == name:
            panels.setdefault(plot.panel, []).append(plot)
    lines = [reports.LinePlot(title=title, x=p[0].axis, y=[one.key for one in p]) for title, p in panels.items()]
    return workspaces.Section(name=name, panels=lines, is_open=True)
