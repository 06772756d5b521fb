"""scripts/gpu_check.sh must be right the first time somebody has a GPU: all of it but the launch runs here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from psyche.bench.gpu.__main__ import main
from psyche.bench.gpu.equality import differences, outer_differences
from psyche.bench.gpu.machine import Emulated
from psyche.bench.gpu.report import write
from psyche.bench.gpu.timing import Timing, timings
from psyche.numerics.backends import emulated
from psyche.numerics.backends.emulated import EmulatedLauncher
from psyche.numerics.backends.sources import kernels_directory


@pytest.fixture(scope="session")
def machine() -> Emulated:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler to build the emulator with")
    return Emulated()


def test_the_whole_check_writes_its_tables(
    machine: Emulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check", "--emulate", "--out", str(tmp_path)])
    assert main() == 0
    assert "Every bit is as defined." in capsys.readouterr().out
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    assert content["differences"] == {}
    assert {(row["codec"], row["pass"]) for row in content["rows"]} >= {
        ("int8", "encode"), ("topk2", "decode_add"), ("int4", "check"), ("all", "outer"),
    }  # fmt: skip
    assert all(row["equal"] and row["milliseconds"] > 0 for row in content["rows"])
    assert "| topk2-512 | encode | equal |" in (tmp_path / "gpu_check.md").read_text()


def test_a_kernel_that_rounds_otherwise_is_reported(machine: Emulated, tmp_path: Path) -> None:
    kernels = tmp_path / "kernels"
    shutil.copytree(kernels_directory(), kernels)
    header = kernels / "include" / "psyche_numerics.h"
    right = "{ return add(sum, mul(value, weight)); }"
    assert right in header.read_text()
    header.write_text(header.read_text().replace(right, "{ return __builtin_fmaf(value, weight, sum); }"))
    faulty = Emulated()
    faulty.launcher = EmulatedLauncher(emulated.build(kernels, cache=tmp_path))
    found = list(differences(faulty, "int8"))
    assert {difference.what for difference in found} >= {"the decoded sum"}
    assert "the payload" not in {difference.what for difference in found}
    assert not list(outer_differences(faulty))
    table = write(tmp_path, {"device": "emulated"}, {"int8": found}, [_timing("int8", 0.9)], timed=True)
    assert "| int8 | encode | DIFFERENT |" in table
    assert "int8: the decoded sum differs on normal values, 4096 elements" in table


def _timing(codec: str, share: float) -> Timing:
    return Timing(codec, "encode", 4096, 4096 * 17, seconds=1.0, copy_seconds=share)


def test_kernels_slower_than_the_bar_are_marked(tmp_path: Path) -> None:
    rows = [_timing("int8", 0.84), _timing("int4", 0.86)]
    table = write(tmp_path, {"device": "card"}, {"int8": [], "int4": []}, rows, timed=True)
    assert re.search(r"int8 .* 84% \(below 85%\) \|", table)
    assert re.search(r"int4 .* 86% \|", table)


def test_bytes_moved_are_those_of_the_formats(machine: Emulated) -> None:
    """Per parameter, as derived: encode 16 + b/8 + 4/B, decode and add 8 + b/8 + 4/B, outer step 24."""
    moved = {(timing.codec, timing.step): timing.bytes_moved / timing.elements for timing in timings(machine)}
    header = 32 / machine.elements
    assert moved["int8", "encode"] == pytest.approx(17 + 4 / 256 + header)
    assert moved["int8", "decode_add"] == pytest.approx(9 + 4 / 256 + header)
    assert moved["int4", "encode"] == pytest.approx(16.5 + 2 / 128 + header)
    assert moved["int2", "decode_add"] == pytest.approx(8.25 + 4 / 256 + header)
    assert moved["all", "outer"] == 24


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    monkeypatch.setattr("torch.version.cuda", None)
    assert main() == 2
    assert "torch is a CPU build: install" in capsys.readouterr().err
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main() == 2
    assert "install or start NVIDIA's driver" in capsys.readouterr().err
