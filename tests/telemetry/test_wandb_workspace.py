from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from psyche.cli.dashboard_command import dashboard
from psyche.telemetry import metrics as names
from psyche.telemetry import wandb_workspace
from psyche.telemetry.event_log import EventLog
from psyche.telemetry.events import StepDone

from .story import MANIFEST, PEERS, metrics, story

GROUP = MANIFEST.run_id.hex()


def panels(layout: str) -> list[dict[str, Any]]:
    sections = json.loads(layout)["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel["config"] for section in sections for panel in section["panels"]]


def logged_keys() -> set[str]:
    """What runs really log, axes included, rather than what the table says."""
    keys: set[str] = set()
    for event in story(2):
        keys |= set(names.swarm_row(event))
    keys |= set(names.node_row(metrics(1, PEERS[0], node=PEERS[0])))
    return keys | set(names.node_row(StepDone(1, 1, 1, 4.5, 4e-4, 512.0)))


def test_every_panel_shows_what_is_logged_and_everything_logged_has_a_panel() -> None:
    shown = panels(wandb_workspace.layout(wandb_workspace.build("me", "psyche", GROUP)))
    drawn = {key for panel in shown for key in panel["metrics"]}
    axes = {panel["xAxis"] for panel in shown}
    assert drawn | axes == logged_keys()
    assert axes == {names.OUTER_STEP, names.TOKENS, names.INNER_STEP}


def test_sections_and_filter() -> None:
    section = json.loads(wandb_workspace.layout(wandb_workspace.build("me", "psyche", GROUP)))["spec"]["section"]
    assert [part["name"] for part in section["panelBankConfig"]["sections"]] == list(get_args(names.Section))
    (condition,) = section["runSets"][0]["filters"]["filters"]
    assert (condition["key"]["name"], condition["value"]) == ("group", GROUP)


class TestCommand:
    @pytest.fixture
    def app(self, monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
        monkeypatch.setenv("WANDB_MODE", "offline")
        app = typer.Typer()
        app.command()(dashboard)
        return app

    def test_writes_the_layout_where_there_is_no_key(self, app: typer.Typer, tmp_path: Path) -> None:
        log = EventLog(tmp_path / "coordinator" / "events.jsonl", PEERS[0])
        for event in story(1):
            log.emit(event)
        done = CliRunner().invoke(app, [str(tmp_path)])
        assert done.exit_code == 0, done.output
        assert panels((tmp_path / "wandb-workspace.json").read_text())

    def test_a_directory_without_a_run_is_one_sentence(self, app: typer.Typer, tmp_path: Path) -> None:
        done = CliRunner().invoke(app, [str(tmp_path)])
        assert "no event log of a run" in str(done.exception)
