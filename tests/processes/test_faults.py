"""Nodes die, restart, diverge and lie; the run continues, and each affected node is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from psyche.telemetry.events import (
    CaughtUp,
    Diverged,
    PeerLeft,
    Resynchronised,
    RoundCertified,
    RoundStarted,
    RunFinished,
)
from tests.processes.swarm import PATIENCE, Swarm, alive, descendants, swarm
from tests.tiny import certified_roots, write_config

ROUNDS = {"inner_steps": 40, "min_members": 1}
"""Rounds of about a second, enough of them that a restarted node finds the run in progress."""
QUICK = {"round_min": 3.0, "round_max": 20.0, "exchange_min": 3.0, "exchange_max": 10.0, "silence": 5.0}


@pytest.mark.slow
def test_rounds_close_without_a_killed_node_and_it_rejoins(tmp_path: Path) -> None:
    config = write_config(tmp_path, members=4, rounds=ROUNDS | {"total": 500, "start_members": 4}, deadlines=QUICK)
    names = [f"node-{number}" for number in range(1, 5)]
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        for name in names:
            run.node(name)
        run.wait("coordinator", RoundCertified, lambda event: event.round == 2)
        run.kill("node-4")
        gone = run.wait("coordinator", PeerLeft)
        later = run.wait("coordinator", RoundCertified, lambda event: event.round > gone.round)
        assert gone.peer not in later.accepted
        run.node("node-4")
        run.wait("coordinator", RoundCertified, lambda e: e.round > later.round and gone.peer in e.accepted)
        assert run.events("node-4", CaughtUp) or run.events("node-4", Resynchronised), "it did not catch up"
        stop_and_compare(run, names)


@pytest.mark.slow
def test_when_one_of_two_nodes_dies_the_other_continues(tmp_path: Path) -> None:
    config = write_config(tmp_path, members=2, rounds=ROUNDS | {"total": 8, "start_members": 2}, deadlines=QUICK)
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        run.node("node-1")
        run.node("node-2")
        run.wait("coordinator", RoundCertified, lambda event: event.round == 2)
        run.kill("node-2")
        run.wait("coordinator", RunFinished)
        assert run.join("node-1") == 0
        roots = certified_roots(tmp_path / "run" / "coordinator" / "events.jsonl")
        assert certified_roots(tmp_path / "run" / "node-1" / "events.jsonl") == roots


@pytest.mark.slow
def test_a_stopped_node_does_not_stop_the_others(tmp_path: Path) -> None:
    config = write_config(tmp_path, members=4, rounds=ROUNDS | {"total": 500, "start_members": 4}, deadlines=QUICK)
    names = [f"node-{number}" for number in range(1, 5)]
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        for name in names:
            run.node(name)
        run.wait("coordinator", RoundCertified, lambda event: event.round == 2)
        os.kill(run.processes["node-2"].pid, signal.SIGSTOP)
        run.wait("coordinator", RoundCertified, lambda event: event.round >= 5 and len(event.accepted) == 3)
        os.kill(run.processes["node-2"].pid, signal.SIGCONT)
        cut = run.events("coordinator", RoundCertified)[-1].round
        run.wait("coordinator", RoundCertified, lambda event: event.round > cut and len(event.accepted) == 4)
        stop_and_compare(run, names)


@pytest.mark.slow
def test_a_restarted_coordinator_resumes_the_run(tmp_path: Path) -> None:
    config = write_config(tmp_path, members=2, rounds=ROUNDS | {"total": 12, "start_members": 2}, deadlines=QUICK)
    text = config.read_text().replace("/ip4/127.0.0.1/tcp/0", f"/ip4/127.0.0.1/tcp/{_free_port()}")
    fixed = tmp_path / "coordinator.yaml"
    fixed.write_text(text)
    with swarm(tmp_path / "run", fixed) as run:
        run.coordinator()
        run.config = config
        run.node("node-1")
        run.node("node-2")
        before = run.wait("coordinator", RoundCertified, lambda event: event.round == 3)
        run.kill("coordinator")
        run.config = fixed
        run.coordinator()
        run.wait("coordinator", RoundCertified, lambda event: event.round > before.round + 1)
        for name in ["node-1", "node-2", "coordinator"]:
            assert run.join(name) == 0, run.output(name)
        first, second = (certified_roots(tmp_path / "run" / f"node-{n}" / "events.jsonl") for n in (1, 2))
        assert first == second
        assert len(first) == 12


@pytest.mark.slow
def test_a_node_with_a_wrong_state_is_told_and_resynchronises(tmp_path: Path) -> None:
    config = write_config(tmp_path, members=4, rounds=ROUNDS | {"total": 500, "start_members": 4}, deadlines=QUICK)
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        for number in range(1, 4):
            run.node(f"node-{number}")
        run.node("node-4", module="tests.processes.bitflip")
        told = run.wait("coordinator", Diverged)
        run.wait("node-4", Resynchronised)
        run.wait("coordinator", RoundCertified, lambda event: event.round > told.round and told.peer in event.accepted)
        found = run.events("node-4", RoundCertified)
        assert [event.state_root for event in found if event.round == told.round] == [told.found]
        stop_and_compare(run, ["node-1", "node-2", "node-3"])


@pytest.mark.slow
def test_a_node_with_another_initial_state_fetches_data_and_state(tmp_path: Path) -> None:
    """The node has an empty cache, so no token store, and other random numbers, so another initial state."""
    config = write_config(tmp_path, members=2, rounds=ROUNDS | {"total": 4, "start_members": 2})
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(config.read_text().replace(str(tmp_path / "cache"), str(tmp_path / "other-cache")))
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        run.node("node-1")
        run.node("node-2", module="tests.processes.other_initial_state", config=elsewhere)
        for name in ("node-1", "node-2", "coordinator"):
            assert run.join(name) == 0, run.output(name)
        assert [event.round for event in run.events("node-2", Resynchronised)] == [0]
        roots = certified_roots(run.directory / "coordinator" / "events.jsonl")
        assert certified_roots(run.directory / "node-2" / "events.jsonl") == roots
        assert list((tmp_path / "other-cache" / "data" / "shards").iterdir())


@pytest.mark.slow
def test_no_process_remains_when_the_launcher_is_stopped(tmp_path: Path) -> None:
    """``test_orphans.py`` tests a launcher that is killed."""
    config = write_config(tmp_path, members=2, rounds=ROUNDS | {"total": 500, "start_members": 2})
    directory = tmp_path / "run"
    launcher = subprocess.Popen(
        [sys.executable, "-m", "psyche", "run", str(config), "--peers", "2", "--directory", str(directory)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        log = directory / "coordinator" / "events.jsonl"
        _eventually(lambda: log.exists() and len(certified_roots(log)) > 0)
        below = descendants(launcher.pid)
        assert len(below) >= 6, "three processes and three daemons"
        launcher.send_signal(signal.SIGINT)
        _, error = launcher.communicate(timeout=PATIENCE)
    finally:
        launcher.kill()
        launcher.wait()
    _eventually(lambda: not any(alive(pid) for pid in below))
    assert b"Traceback" not in error
    for name in ("node-1", "node-2", "coordinator"):
        assert "Traceback" not in (directory / f"{name}.log").read_text()


def test_ctrl_c_leaves_a_run_cleanly(tmp_path: Path) -> None:
    patient = QUICK | {"silence": 60.0}  # on a busy machine a node may be silent for long
    config = write_config(tmp_path, members=1, rounds=ROUNDS | {"total": 500, "start_members": 1}, deadlines=patient)
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        run.node("node-1")
        run.wait("coordinator", RoundStarted)
        assert run.kill("node-1", signal.SIGINT) == 130
        assert "Traceback" not in run.output("node-1")
        assert run.wait("coordinator", PeerLeft).reason == "it was stopped"


def stop_and_compare(run: Swarm, names: list[str]) -> None:
    """Ctrl-C ends all processes; every node has certified the same rounds as the coordinator."""
    for name in [*names, "coordinator"]:
        assert run.kill(name, signal.SIGINT) == 130, run.output(name)
    certified = {event.round: event.state_root for event in run.events("coordinator", RoundCertified)}
    assert list(certified) == list(range(1, len(certified) + 1)), "no round is skipped or certified twice"
    for name in names:
        for event in run.events(name, RoundCertified):
            assert certified.get(event.round, event.state_root) == event.state_root
        assert "Traceback" not in run.output(name)


def _eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
