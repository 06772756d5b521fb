"""What the chaos suite is made of does what it says: stories, clocks, cuts, disks."""

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
from tests.slow.chaos.world import World, why_not, world
from tests.tiny import LARGER, certified_roots, write_config

NODES = [f"node-{number}" for number in range(1, 7)]
COORDINATORS = ["coordinator", "standby"]
LISTENER = "import socket, sys; server = socket.create_server((sys.argv[1], 5000)); print(flush=True); sys.stdin.read()"
CALLER = "import socket, sys; socket.create_connection((sys.argv[1], 5000), timeout=1)"

needs_world = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_is_one_story_and_leaves_some_undisturbed(seed: int) -> None:
    story = schedule(seed, 300, NODES, COORDINATORS, ["node-7"])
    assert story == schedule(seed, 300, NODES, COORDINATORS, ["node-7"])
    assert {fault.kind for fault in story} == set(KINDS)
    for moment in (fault.at for fault in story):
        going_on = [
            fault.target
            for fault in story
            if fault.at <= moment <= fault.at + fault.length and fault.kind not in ("partition", "join")
        ]
        assert len(going_on) == len(set(going_on)), "one thing at a time"
        gone = {fault.target for fault in story if fault.kind == "leave" and fault.length == inf}
        there = {*NODES, *(fault.target for fault in story if fault.kind == "join" and fault.at <= moment)}
        assert len(there - gone - set(going_on)) >= UNDISTURBED
        assert set(COORDINATORS) - set(going_on)
    assert story != schedule(seed + 1, 300, NODES, COORDINATORS, ["node-7"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"exchange": {"kind": "gather"}}, {"exchange": {"kind": "sharded"}, "model": LARGER}]
)
def test_the_reference_of_a_run_to_which_nothing_happened_is_that_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = write_config(tmp_path, members=3, **changes)
    config.write_text(config.read_text().replace("checkpoint_every: 2", "checkpoint_every: 10"))  # all of the journal
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
    assert all(0 < abs(loss - found.undisturbed) < 0.1 * found.undisturbed for loss in found.dealt)


@needs_world
@pytest.mark.parametrize("offset", [-3600.5, 90.0])
def test_a_clock_is_off_by_what_it_was_set_to_while_its_process_runs(tmp_path: Path, offset: float) -> None:
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
def two(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "run", ["one", "other"]) as made:
        yield made


@needs_world
@pytest.mark.slow
def test_who_is_cut_off_or_on_the_other_side_is_not_reached(two: World) -> None:
    there = two.spots["other"].place
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


@needs_world
@pytest.mark.slow
def test_a_full_disk_takes_nothing_until_it_is_freed(two: World) -> None:
    path = two.directory / "one" / "file"
    two.fill("one")
    with pytest.raises(OSError, match="No space left"):
        path.write_bytes(bytes(1 << 16))
    (two.directory / "other" / "file").write_bytes(bytes(1 << 16))
    two.free("one")
    path.write_bytes(bytes(1 << 16))


def reaches(two: World) -> bool:
    """Whether a connection can be made, now or in some seconds: a bridge takes a moment to see that a port is up."""
    command = [sys.executable, "-c", CALLER, two.spots["other"].place.address]
    for _ in range(3):
        done = subprocess.run(two.spots["one"].place.command(command), capture_output=True, check=False)
        if done.returncode == 0:
            return True
    return False
