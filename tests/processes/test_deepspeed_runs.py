"""Nodes of several ranks, as real processes: bit-equal to other nodes, and stopped as a whole if a rank dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from psyche.telemetry.events import Notice, PeerLeft, RoundCertified, RoundStarted, StepDone
from tests.processes.swarm import PATIENCE, Swarm, alive, descendants, swarm
from tests.tiny import certified_roots, write_config

pytestmark = pytest.mark.slow
DEADLINES = {"round_min": 20.0, "round_max": 90.0, "exchange_min": 5.0, "exchange_max": 20.0, "silence": 10.0}


def ranked(config: Path, **deepspeed: object) -> Path:
    """Write the same configuration for a node with two ranks."""
    tree = yaml.safe_load(config.read_text())
    tree["node"]["deepspeed"] = {"ranks": 2} | deepspeed
    path = config.with_name("ranked.yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


def ranks_below(pid: int) -> list[int]:
    """Pids of the rank processes of a node."""
    found = []
    for child in descendants(pid):
        try:
            command = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        if b"psyche.training.zero.rank_main" in command:
            found.append(child)
    return sorted(found)


@pytest.mark.parametrize("overlap", [{}, {"fragments": 2, "overlap_steps": 2}], ids=["plain", "overlapping"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_node_with_two_ranks_and_one_without_hold_the_same_state(
    tmp_path: Path, stage: int, overlap: dict[str, int]
) -> None:
    config = write_config(tmp_path, members=2, deadlines=DEADLINES, overlap=overlap)
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        run.node("node-1")
        run.node("node-2", config=ranked(config, stage=stage))
        run.wait("node-2", RoundStarted)  # ranks start slowly
        for name in ("node-1", "node-2", "coordinator"):
            assert run.join(name) == 0, run.output(name)
        roots = certified_roots(run.directory / "coordinator" / "events.jsonl")
        assert len(roots) == 4
        for name in ("node-1", "node-2"):
            assert certified_roots(run.directory / name / "events.jsonl") == roots
        assert all(len(event.accepted) == 2 for event in run.events("coordinator", RoundCertified))
        engines = {name: engine_of(run, name) for name in ("node-1", "node-2")}
        assert engines["node-1"].startswith("TorchEngine on cpu")
        assert engines["node-2"].startswith(f"DeepSpeedEngine on 2 CPU ranks, ZeRO {stage}")
        assert "DeepSpeed" not in run.output("node-2").replace(engines["node-2"], ""), (
            "DeepSpeed's own output is not in the log"
        )


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Swarm]:
    """Three nodes in round 2; node-3 has two ranks and is training."""
    rounds = {"inner_steps": 600, "total": 500, "start_members": 3, "min_members": 1}
    config = write_config(tmp_path, members=3, rounds=rounds, deadlines=DEADLINES)
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        for name in ("node-1", "node-2"):
            run.node(name)
        run.node("node-3", config=ranked(config))
        run.wait("node-3", RoundStarted, lambda event: event.round == 2)
        run.wait("node-3", StepDone, lambda event: event.round >= 2)
        yield run


def test_a_node_whose_rank_is_killed_leaves_and_the_round_closes(training: Swarm) -> None:
    ranks = ranks_below(training.processes["node-3"].pid)
    assert len(ranks) == 2
    os.kill(ranks[0], signal.SIGKILL)
    assert training.join("node-3") == 1
    assert "of 2 was killed (SIGKILL)" in training.output("node-3")
    assert "Traceback" not in training.output("node-3")
    assert any("was killed (SIGKILL)" in event.text for event in training.events("node-3", Notice))
    gone = training.wait("coordinator", PeerLeft)
    assert gone.reason == "it has failed"
    closed = training.wait("coordinator", RoundCertified, lambda event: event.round == gone.round)
    assert gone.peer not in closed.accepted
    training.wait("coordinator", RoundCertified, lambda event: event.round > gone.round and len(event.accepted) == 2)
    assert not any(map(alive, ranks))


def test_a_node_that_is_killed_leaves_no_ranks(training: Swarm) -> None:
    ranks = ranks_below(training.processes["node-3"].pid)
    training.kill("node-3")
    deadline = time.monotonic() + PATIENCE
    while any(map(alive, ranks)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def engine_of(run: Swarm, name: str) -> str:
    """Return what a node's log says about its engine."""
    return next(event.text for event in run.events(name, Notice) if "Engine on" in event.text)
