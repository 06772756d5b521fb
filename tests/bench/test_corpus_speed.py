"""The data bench end to end on little text: its rows exist; speeds are not asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from psyche.bench.corpus_speed import Plan, main


@pytest.mark.slow
def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(tmp_path / "rows.json", Plan(text_bytes=3_000_000, sequence_length=64, batch=8))
    prepared, *readings = json.loads((tmp_path / "rows.json").read_text())
    assert prepared["text_bytes"] == 3_000_000
    assert prepared["tokens"] > 300_000
    assert prepared["peak_bytes"] > 50e6
    assert [reading["way"] for reading in readings] == ["psyche", "numpy.memmap, one file"]
    assert all(reading["memory_gbps"] == pytest.approx(4 * reading["disk_gbps"]) for reading in readings)
    assert "peak memory" in capsys.readouterr().out
