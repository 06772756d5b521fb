"""A process dies at each change that it makes to the disk: what is read afterwards is the old value or the new one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from psyche.processes.coordinator_process import GENESIS, INVITE
from tests.durability.cases import CASES, DurabilityCase
from tests.durability.sweep import DIED

SLOW = {"token store", GENESIS, INVITE, "ledger that goes back", "journal of copies"}
"""The first with a second for each death; the fast tests kill it at chosen ones (``tests/data/test_prepare.py``). The
others are written as the manifest, the ledger and the journal are, which stay with the fast tests."""


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("preload") / "dying.so"
    source = Path(__file__).with_name("dying.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, preload: Path) -> Path:
    """What the children of all fast cases left behind, by case and value: one process imports for all of them."""
    place = tmp_path_factory.mktemp("left")
    run(place, preload, [case.name for case in CASES if case.name not in SLOW])
    return place


def run(place: Path, preload: Path, names: list[str]) -> None:
    environment = os.environ | {"LD_PRELOAD": str(preload)}
    command = [sys.executable, "-m", "tests.durability.sweep", str(place), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in SLOW], ids=lambda case: case.name)
def test_what_is_left_is_the_old_value_or_the_new_one(case: DurabilityCase, left: Path) -> None:
    for value in range(1, case.last + 1):
        judge(case, value, left / case.name / str(value))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.name in SLOW], ids=lambda case: case.name)
def test_what_takes_longer_is_so_too(case: DurabilityCase, tmp_path: Path, preload: Path) -> None:
    run(tmp_path, preload, [case.name])
    for value in range(1, case.last + 1):
        judge(case, value, tmp_path / case.name / str(value))


def judge(case: DurabilityCase, value: int, place: Path) -> None:
    """Look at all that the writer of ``value`` left where it died, and write it once more there."""
    endings: dict[str, int] = json.loads((place / "endings.json").read_text())
    assert sum(code == DIED for code in endings.values()) >= 3, "nothing was written"
    for name, code in endings.items():
        assert code in (0, DIED), f"{name}: {'it was not on the disk' if code == 3 else 'an error'} when it returned"
        found = case.read(place / name)
        assert found in ((value - 1, value) if code == DIED else (value,)), name
        if found < value:
            case.write(place / name, value)
            assert case.read(place / name) == value, f"{name}: it cannot be written again"
