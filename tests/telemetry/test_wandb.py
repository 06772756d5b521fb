from __future__ import annotations

import json
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from psyche.config import Wandb
from psyche.telemetry import metrics as names
from psyche.telemetry.events import Event, MemberMetrics, Notice, RoundSummary, StepDone
from psyche.telemetry.wandb_run import WandbRun, _silenced, key_configured, own_run, resolve_mode, swarm_run

from .story import MANIFEST, PARAMETERS, PEERS, metrics, story

OFFLINE = Wandb(mode="offline")


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(_silenced().settings, "api_key", None)  # W&B reads the environment once in a process


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, which is a LevelDB log: 32 KiB blocks of (crc, length, kind, bytes) chunks."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, whole = path.read_bytes(), 7, b""  # after W&B's own header
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        chunk = data[position + 7 : position + 7 + length]
        if len(chunk) < length:
            return  # still being written
        whole += chunk
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of several chunks
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def logged(directory: Path) -> tuple[list[dict[str, Any]], list[Any]]:
    (path,) = directory.glob("wandb/offline-run-*/*.wandb")
    found: list[Any] = []
    deadline = time.monotonic() + 120  # a guard, not a measurement
    # W&B's service puts the file on disk a moment after run.finish() has returned.
    while not (found and found[-1].WhichOneof("record_type") == "exit"):
        assert time.monotonic() < deadline, "the run was never finished"
        time.sleep(0.02)
        found = list(records(path))
    rows = [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]
    return rows, found


def feed(run: WandbRun, events: list[Event]) -> None:
    for event in events:
        run(event)
    run.close()


class TestSwarmRun:
    def test_an_offline_run_holds_every_metric(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        heard: list[Event] = []
        feed(swarm_run(OFFLINE, tmp_path, MANIFEST, heard.append), list(story(3)))
        rows, found = logged(tmp_path)
        assert len(rows) == 4  # before the first round, and three rounds
        assert rows[0][names.OUTER_STEP] == 0
        assert rows[0]["heldout/loss"] == pytest.approx(8.317)
        assert [row[names.OUTER_STEP] for row in rows] == [0, 1, 2, 3]
        assert {metric.key for metric in names.SWARM_PLOTS} <= set(rows[-1])
        defined = {r.metric.name: r.metric.step_metric for r in found if r.WhichOneof("record_type") == "metric"}
        assert {metric.key: metric.axis for metric in names.SWARM_PLOTS}.items() <= defined.items()
        (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
        assert run.run_id == MANIFEST.run_id.hex()[:16]
        assert run.run_group == MANIFEST.run_id.hex()
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["resolved"]["parameters"] == PARAMETERS
        (notice,) = heard
        assert isinstance(notice, Notice)
        assert "wandb sync" in notice.text
        assert capfd.readouterr() == ("", "")  # nothing in a contributor's terminal

    def test_disabled_touches_nothing(self, tmp_path: Path) -> None:
        heard: list[Event] = []
        feed(swarm_run(Wandb(mode="disabled"), tmp_path / "w", MANIFEST, heard.append), list(story(1)))
        assert heard == []
        assert not (tmp_path / "w").exists()

    def test_no_place_to_write_is_one_notice(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        heard: list[Event] = []
        feed(swarm_run(OFFLINE, tmp_path / "file" / "w", MANIFEST, heard.append), list(story(3)))
        (notice,) = heard
        assert isinstance(notice, Notice)
        assert "continues without it" in notice.text

    def test_a_bad_key_falls_back_to_offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_API_KEY", "short")
        heard: list[Event] = []
        feed(swarm_run(Wandb(), tmp_path, MANIFEST, heard.append), list(story(2)))
        (notice,) = heard
        assert isinstance(notice, Notice)
        assert "cannot log online" in notice.text
        assert len(logged(tmp_path)[0]) == 3

    def test_the_run_never_waits(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        answered = threading.Event()
        monkeypatch.setattr(WandbRun, "_start", lambda self, mode: answered.wait())
        monkeypatch.setattr("psyche.telemetry.wandb_run.QUEUE_ROWS", 2)
        heard: list[Event] = []
        run = swarm_run(OFFLINE, tmp_path, MANIFEST, heard.append)
        for event in story(16):
            run(event)
        run.close(timeout=0.1)  # that we come to the next line, while W&B has not answered, is the test
        assert len(heard) == 1
        answered.set()


class TestOwnRun:
    def test_is_only_made_when_asked_for(self, tmp_path: Path) -> None:
        assert own_run(OFFLINE, tmp_path, MANIFEST, PEERS[1], lambda event: None) is None

    def test_logs_this_nodes_steps_and_rounds_in_the_group(self, tmp_path: Path) -> None:
        run = own_run(Wandb(mode="offline", own_run=True), tmp_path, MANIFEST, PEERS[1], lambda event: None)
        assert run is not None
        mine, other = metrics(1, PEERS[1], node=PEERS[1]), metrics(1, PEERS[2], node=PEERS[1])
        feed(run, [StepDone(1, 5, 5, 4.5, 4e-4, 512.0), StepDone(1, 6, 6, None, 4e-4, 512.0), mine, other])
        rows, found = logged(tmp_path)
        assert [row.get("node/loss") for row in rows] == [4.5, None, None]
        assert {metric.key for metric in names.MEMBER_PLOTS} <= set(rows[2])
        (run_record,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
        assert run_record.run_group == MANIFEST.run_id.hex()
        assert run_record.run_id != MANIFEST.run_id.hex()[:16]


class TestMode:
    def test_auto_is_offline_without_a_key(self) -> None:
        assert resolve_mode(Wandb()) == "offline"
        assert resolve_mode(Wandb(mode="online")) == "online"

    def test_auto_is_online_with_a_key(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40 + "\n")
        assert key_configured()
        (tmp_path / "netrc").unlink()
        assert not key_configured()
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        assert resolve_mode(Wandb()) == "online"

    def test_the_environment_wins_over_auto(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_MODE", "disabled")
        assert resolve_mode(Wandb()) == "disabled"
        assert resolve_mode(Wandb(mode="offline")) == "offline"


def test_every_plot_shows_a_field_that_exists() -> None:
    assert {plot.field for plot in names.SWARM_PLOTS} <= set(RoundSummary.__struct_fields__)
    assert {plot.field for plot in names.STEP_PLOTS} <= set(StepDone.__struct_fields__)
    assert {plot.field for plot in names.MEMBER_PLOTS} <= set(MemberMetrics.__struct_fields__)
    assert len({plot.key for plot in names.PLOTS}) == len(names.PLOTS)
