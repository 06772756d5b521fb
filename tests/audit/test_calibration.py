"""Calibration: equal nodes reproduce each other bit for bit, and every fraud differs from honest work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from psyche.audit import calibrate_command as calibrating
from psyche.audit.calibrate_command import calibrate, measure, prepared
from psyche.audit.calibration import COPY, FRAUDS, HALF, NOISE, ONE_STEP, OTHER, TENTH, NodeKind
from psyche.config import load_config
from tests.tiny import write_config

PLAIN = NodeKind("fp32, 1 thread", "cpu", 1, "fp32")
AGAIN = NodeKind("fp32, repeated", "cpu", 1, "fp32")
HALVED = NodeKind("bf16, 1 thread", "cpu", 1, "bf16")
INNER = {"lr": 0.003, "batch_size": 2, "warmup_steps": 2}


def test_calibration_measures_the_errors_that_audits_would(tmp_path: Path) -> None:
    rounds = {"total": 8, "inner_steps": 20, "start_members": 2}
    config = load_config(write_config(tmp_path, members=2, rounds=rounds, audits={"trace_steps": 10}))
    _, store = prepared(tmp_path / "tiny.yaml", None)
    found = measure(config, store, [PLAIN, AGAIN, HALVED], 2)
    assert [(one.round, one.start, one.stop) for one in found.segments] == [
        (0, 0, 10),
        (0, 10, 20),
        (1, 0, 10),
        (1, 10, 20),
    ]
    for pair in ((PLAIN, AGAIN), (AGAIN, PLAIN)):
        assert found.errors[pair[0].name, pair[1].name] == [0.0] * 4
    noise = found.errors[HALVED.name, PLAIN.name]
    assert 0 < max(noise) < 0.2
    for auditor in (PLAIN.name, AGAIN.name, HALVED.name):
        assert len(found.errors[TENTH, auditor]) == 4
        assert min(found.errors[TENTH, auditor]) > 0.02
        assert min(found.errors[HALF, auditor]) > 0.2
        for fraud in (OTHER, COPY, NOISE):
            assert min(found.errors[fraud, auditor]) > 0.4
    assert found.errors[ONE_STEP, PLAIN.name] == found.errors[TENTH, PLAIN.name], "one of ten steps is a tenth"


def test_a_calibration_prints_the_thresholds_to_configure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = {"total": 8, "inner_steps": 10, "start_members": 2}
    path = write_config(tmp_path, members=2, rounds=rounds)
    monkeypatch.setattr(calibrating, "available_node_kinds", lambda threads: [PLAIN, HALVED])
    written, picture = tmp_path / "out" / "errors.json", tmp_path / "out" / "errors.png"
    calibrate(*prepared(path, None), 4, json=written, picture=picture)
    printed = capsys.readouterr()
    found = json.loads(written.read_text())
    assert f"audits: {{pass_error: {found['pass_error']:g}, fail_error: {found['fail_error']:g}}}" in printed.out
    assert all(fraud in printed.out for fraud in FRAUDS)
    assert "100 %" in printed.err or "%" in printed.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    load_config(write_config(tmp_path, members=2, audits={key: found[key] for key in ("pass_error", "fail_error")}))
