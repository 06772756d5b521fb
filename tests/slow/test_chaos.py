"""Nodes are killed, frozen and restarted at random for a while: one chain, the same bits, no orphan."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from psyche.telemetry.events import RoundCertified
from tests.roles.swarm import Swarm, alive, descendants, swarm
from tests.roles.tiny import write_config

SECONDS = 150.0
NODES = [f"node-{number}" for number in range(1, 6)]
QUICK = {"round_min": 3.0, "round_max": 20.0, "exchange_min": 3.0, "exchange_max": 10.0, "silence": 5.0}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_swarm_under_random_faults_keeps_one_chain(tmp_path: Path, seed: int) -> None:
    rounds = {"inner_steps": 40, "total": 5000, "start_members": 5, "min_members": 1}
    config = write_config(tmp_path, members=5, rounds=rounds, deadlines=QUICK)
    draw = random.Random(seed)
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        for name in NODES:
            run.node(name)
        run.wait("coordinator", RoundCertified)
        before = {pid for process in run.processes.values() for pid in descendants(process.pid)}
        frozen: set[str] = set()
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            _fault(run, draw, frozen)
            time.sleep(draw.uniform(1.0, 8.0))
        for name in frozen:
            os.kill(run.processes[name].pid, signal.SIGCONT)
        for name in NODES:
            if name not in run.processes:
                run.node(name)
        reached = run.events("coordinator", RoundCertified)[-1].round
        whole = run.wait("coordinator", RoundCertified, lambda e: e.round > reached and len(e.accepted) == 5)
        assert whole.round > reached, "everybody is back"
        before |= {pid for process in run.processes.values() for pid in descendants(process.pid)}
        for name in [*NODES, "coordinator"]:
            assert run.kill(name, signal.SIGINT) == 130, run.output(name)
        _compare(run)
        assert not [pid for pid in before if alive(pid)], "an orphan"


def _fault(run: Swarm, draw: random.Random, frozen: set[str]) -> None:
    """Kill, freeze, thaw or restart one node; never leave fewer than two that run."""
    running = [name for name in NODES if name in run.processes and name not in frozen]
    dead = [name for name in NODES if name not in run.processes]
    kind = draw.choice(["kill", "freeze", "thaw", "start", "start"])
    if kind in ("kill", "freeze") and len(running) > 2:
        name = draw.choice(running)
        if kind == "kill":
            run.kill(name)
        else:
            os.kill(run.processes[name].pid, signal.SIGSTOP)
            frozen.add(name)
    elif kind == "thaw" and frozen:
        name = draw.choice(sorted(frozen))
        os.kill(run.processes[name].pid, signal.SIGCONT)
        frozen.discard(name)
    elif kind == "start" and dead:
        run.node(draw.choice(dead))


def _compare(run: Swarm) -> None:
    certified = {event.round: event.state_root for event in run.events("coordinator", RoundCertified)}
    assert list(certified) == list(range(1, len(certified) + 1)), "a round was skipped or certified twice"
    for name in NODES:
        for event in run.events(name, RoundCertified):
            assert certified.get(event.round, event.state_root) == event.state_root, name
        assert "Traceback" not in run.output(name), run.output(name)[-3000:]
