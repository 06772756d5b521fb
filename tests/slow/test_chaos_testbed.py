"""The chaos suite's own parts work: schedules, clocks, network cuts, partitions and full disks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest

from psyche.config import MANIFEST, Manifest, load_config
from psyche.exchange.payload_journal import DIRECTORY as JOURNAL
from psyche.ledger.store import NAME as LEDGER
from psyche.network.identity import IDENTITY
from psyche.processes.local_run import run_locally
from psyche.telemetry.event_log import LOG_NAME
from tests.slow.chaos.clock import Clock, build
from tests.slow.chaos.faults import KINDS, UNDISTURBED, schedule
from tests.slow.chaos.replay import Reference, records_of
from tests.slow.chaos.testbed import Testbed, make_testbed, missing_requirement
from tests.tiny import LARGER, certified_roots, write_config

NODES = [f"node-{number}" for number in range(1, 7)]
COORDINATORS = ["coordinator", "standby"]
LISTENER = "import socket, sys; server = socket.create_server((sys.argv[1], 5000)); print(flush=True); sys.stdin.read()"
CALLER = "import socket, sys; socket.create_connection((sys.argv[1], 5000), timeout=1)"

needs_testbed = pytest.mark.skipif(missing_requirement() is not None, reason=missing_requirement() or "")


@pytest.mark.parametrize("seed", range(20))
def test_a_schedule_follows_from_its_seed_and_leaves_some_nodes_undisturbed(seed: int) -> None:
    faults = schedule(seed, 300, NODES, COORDINATORS, ["node-7"])
    assert faults == schedule(seed, 300, NODES, COORDINATORS, ["node-7"])
    assert {fault.kind for fault in faults} == set(KINDS)
    for moment in (fault.at for fault in faults):
        disturbed = [
            fault.target
            for fault in faults
            if fault.at <= moment <= fault.at + fault.length and fault.kind not in ("partition", "join")
        ]
        assert len(disturbed) == len(set(disturbed)), "one fault per process at a time"
        gone = {fault.target for fault in faults if fault.kind == "leave" and fault.length == inf}
        there = {*NODES, *(fault.target for fault in faults if fault.kind == "join" and fault.at <= moment)}
        assert len(there - gone - set(disturbed)) >= UNDISTURBED
        assert set(COORDINATORS) - set(disturbed)
    assert faults != schedule(seed + 1, 300, NODES, COORDINATORS, ["node-7"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"exchange": {"kind": "gather"}}, {"exchange": {"kind": "sharded"}, "model": LARGER}]
)
def test_the_reference_reproduces_a_run_without_faults(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = write_config(tmp_path, members=3, **changes)
    config.write_text(
        config.read_text().replace("checkpoint_every: 2", "checkpoint_every: 10")
    )  # the journal keeps every payload
    run = tmp_path / "run"
    run_locally(config, None, run, fresh=True, report=False)
    names = [f"node-{number}" for number in range(1, 4)]
    payloads = tmp_path / "payloads"
    for name in names:
        shutil.copytree(run / name / JOURNAL, payloads, dirs_exist_ok=True)
    manifest = Manifest.decode((run / "coordinator" / MANIFEST).read_bytes())
    reference = Reference(manifest, load_config(config).node, tuple(run / name / IDENTITY for name in names))
    records = records_of([run / name / LEDGER for name in names])
    roots, taker = reference.replay(records, payloads)
    assert [root.hex() for root in roots] == certified_roots(run / "coordinator" / LOG_NAME)
    found = reference.losses(records, taker)
    assert found.undisturbed == found.after < found.before
    assert all(0 < abs(loss - found.undisturbed) < 0.1 * found.undisturbed for loss in found.reordered)


@needs_testbed
@pytest.mark.parametrize("offset", [-3600.5, 90.0])
def test_the_clock_of_a_running_process_can_be_shifted(tmp_path: Path, offset: float) -> None:
    clock = Clock(tmp_path / "clock", build(tmp_path))
    program = "import time\nwhile input():\n    print(time.time(), time.monotonic(), flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | clock.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for wanted in (0.0, offset, 0.0):
            clock.set(wanted)
            before = time.time(), time.monotonic()
            process.stdin.write("?\n")
            process.stdin.flush()
            wall, steady = (float(text) for text in process.stdout.readline().split())
            after = time.time(), time.monotonic()
            assert before[0] <= wall - wanted <= after[0]
            assert before[1] <= steady <= after[1]
        process.kill()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Testbed]:
    with make_testbed(tmp_path / "run", ["one", "other"]) as made:
        yield made


@needs_testbed
@pytest.mark.slow
def test_a_node_that_is_cut_off_or_partitioned_away_is_unreachable(two: Testbed) -> None:
    there = two.hosts["other"].place
    command = there.command([sys.executable, "-c", LISTENER, there.address])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        listener.stdout.readline()
        assert reaches(two)
        two.cut("other")
        assert not reaches(two)
        two.heal("other")
        assert reaches(two)
        two.part(["one"])
        assert not reaches(two)
        two.unite()
        assert reaches(two)
        listener.kill()


@needs_testbed
@pytest.mark.slow
def test_writes_to_a_full_disk_fail_until_space_is_freed(two: Testbed) -> None:
    path = two.directory / "one" / "file"
    two.fill("one")
    with pytest.raises(OSError, match="No space left"):
        path.write_bytes(bytes(1 << 16))
    (two.directory / "other" / "file").write_bytes(bytes(1 << 16))
    two.free("one")
    path.write_bytes(bytes(1 << 16))


def reaches(two: Testbed) -> bool:
    """Return whether a connection succeeds within a few tries: a bridge notices a port that comes up with a delay."""
    command = [sys.executable, "-c", CALLER, two.hosts["other"].place.address]
    for _ in range(3):
        done = subprocess.run(two.hosts["one"].place.command(command), capture_output=True, check=False)
        if done.returncode == 0:
            return True
    return False
