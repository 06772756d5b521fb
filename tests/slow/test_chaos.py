"""Nodes and coordinators are killed, frozen and restarted at random: one chain, the same bits, no orphan.

For PSYCHE_CHAOS_SECONDS a seed, 150 by default.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from psyche.config import MANIFEST, Manifest
from psyche.roles.ledger import verify_ledger
from psyche.state.ledger import NAME as LEDGER
from psyche.state.ledger import Ledger
from psyche.telemetry.events import RoundCertified
from tests.roles.swarm import PATIENCE, Swarm, alive, descendants, standby_key, swarm
from tests.roles.tiny import write_config

SECONDS = float(os.environ.get("PSYCHE_CHAOS_SECONDS", "150"))
NODES = [f"node-{number}" for number in range(1, 6)]
COORDINATORS = ["coordinator", "standby"]
QUICK = {"round_min": 3.0, "round_max": 20.0, "exchange_min": 3.0, "exchange_max": 10.0, "silence": 5.0, "lease": 4.0}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_swarm_under_random_faults_keeps_one_chain(tmp_path: Path, seed: int) -> None:
    rounds = {"inner_steps": 40, "total": 5000, "start_members": 5, "min_members": 1}
    key = standby_key(tmp_path / "run" / "standby")
    config = write_config(tmp_path, members=5, rounds=rounds, deadlines=QUICK, standbys=[key])
    chaos = Chaos(random.Random(seed))
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        run.standby("standby")
        for name in NODES:
            run.node(name)
        run.wait("node-1", RoundCertified)
        before = children(run)
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            chaos.fault(run)
            time.sleep(chaos.draw.uniform(1.0, 8.0))
            before |= children(run)
        chaos.end(run)
        whole(run)
        before |= children(run)
        for name in [*NODES, *COORDINATORS]:
            assert run.kill(name, signal.SIGINT) == 130, run.output(name)
        print(f"seed {seed}: {dict(chaos.count)}, {compare(run)} rounds")
        assert not [pid for pid in before if alive(pid)], "an orphan"


class Chaos:
    """Kills, freezes, thaws and restarts; leaves two nodes and one coordinator that run."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.frozen: set[str] = set()
        self.count: Counter[str] = Counter()

    def fault(self, run: Swarm) -> None:
        group, least = (COORDINATORS, 1) if self.draw.random() < 0.25 else (NODES, 2)
        running = [name for name in group if name in run.processes and name not in self.frozen]
        dead = [name for name in group if name not in run.processes]
        frozen = sorted(self.frozen & set(group))
        kind = self.draw.choice(["kill", "freeze", "thaw", "start", "start"])
        if kind in ("kill", "freeze") and len(running) > least:
            name = self.draw.choice(running)
            if kind == "kill":
                run.kill(name)
            else:
                os.kill(run.processes[name].pid, signal.SIGSTOP)
                self.frozen.add(name)
        elif kind == "thaw" and frozen:
            name = self.draw.choice(frozen)
            os.kill(run.processes[name].pid, signal.SIGCONT)
            self.frozen.discard(name)
        elif kind == "start" and dead:
            start(run, self.draw.choice(dead))
        else:
            return
        self.count[f"{kind} {'coordinator' if group is COORDINATORS else 'node'}"] += 1

    def end(self, run: Swarm) -> None:
        """Everybody is back."""
        for name in self.frozen:
            os.kill(run.processes[name].pid, signal.SIGCONT)
        for name in [*COORDINATORS, *NODES]:
            if name not in run.processes:
                start(run, name)


def start(run: Swarm, name: str) -> None:
    if name in NODES:
        run.node(name)
    elif name == "standby":
        run.standby(name)
    else:
        run.coordinator()


def whole(run: Swarm) -> None:
    """Wait for a round that everybody contributes to."""
    reached = max((event.round for event in run.events("node-1", RoundCertified)), default=0)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        for event in run.events("node-1", RoundCertified):
            if event.round > reached and len(event.accepted) == len(NODES):
                return
        time.sleep(0.5)
    raise AssertionError("\n\n".join(f"{name}: {run.output(name)[-1500:]}" for name in [*COORDINATORS, *NODES]))


def children(run: Swarm) -> set[int]:
    return {pid for process in run.processes.values() for pid in descendants(process.pid)}


def compare(run: Swarm) -> int:
    """All that anybody holds of a round is the same, and proven; the last round."""
    manifest = Manifest.decode((run.directory / "node-1" / MANIFEST).read_bytes())
    hashes: dict[int, bytes | None] = {}
    roots: dict[int, str] = {}
    for name in [*NODES, *COORDINATORS]:
        verify_ledger(run.directory / name / LEDGER, manifest)
        with Ledger.read(run.directory / name / LEDGER) as ledger:
            assert not ledger.superseded(), name
            for round in ledger.rounds():
                assert hashes.setdefault(round, ledger.hash_of(round)) == ledger.hash_of(round), (name, round)
        for event in run.events(name, RoundCertified):
            assert roots.setdefault(event.round, event.state_root) == event.state_root, (name, event.round)
        assert "Traceback" not in run.output(name), run.output(name)[-3000:]
    assert sorted(hashes) == list(range(1, max(hashes) + 1)), "a round is missing"
    return max(hashes)
