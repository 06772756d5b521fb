"""Two coordinators: when one dies, the other continues the round, and nothing is certified twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from psyche.config import MANIFEST, Manifest
from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.verify import verify_ledger
from psyche.telemetry.events import Notice, RoundCertified, RoundStarted
from tests.processes.swarm import Swarm, standby_key, swarm
from tests.tiny import certified_roots, write_config

LEASE = 4.0
QUICK = {
    "round_min": 3.0,
    "round_max": 60.0,
    "exchange_min": 3.0,
    "exchange_max": 10.0,
    "silence": 5.0,
    "lease": LEASE,
}
NAMES = ("node-1", "node-2", "node-3", "node-4")
"""One of four may be slow to vote; with one coordinator gone, the electorate cannot be reduced."""


def two_coordinators(directory: Path, members: int = len(NAMES), inner_steps: int = 40, **deadlines: float) -> Path:
    """Write a configuration with a standby."""
    key = standby_key(directory / "run" / "standby")
    rounds = {"inner_steps": inner_steps, "min_members": 1, "total": 500, "start_members": members}
    return write_config(directory, members=members, rounds=rounds, deadlines=QUICK | deadlines, standbys=[key])


@pytest.mark.slow
def test_a_round_in_training_is_not_restarted_when_the_leader_dies(tmp_path: Path) -> None:
    with swarm(tmp_path / "run", two_coordinators(tmp_path, inner_steps=3000, round_max=600.0)) as run:
        start(run)
        for name in NAMES:
            run.wait(name, RoundStarted, lambda event: event.round == 2)
        run.kill("coordinator")
        assert len(run.wait("standby", RoundCertified).accepted) == len(NAMES)
        for name in NAMES:
            assert [event.round for event in run.events(name, RoundStarted)].count(2) == 1


@pytest.mark.slow
def test_a_standby_takes_over_and_the_first_coordinator_returns_as_standby(tmp_path: Path) -> None:
    config = two_coordinators(tmp_path)
    with swarm(tmp_path / "run", config) as run:
        start(run)
        run.wait("coordinator", RoundCertified, lambda event: event.round == 2)
        run.kill("coordinator")
        last = run.events("coordinator", RoundCertified)[-1].round
        first = run.wait("standby", RoundCertified)
        assert first.round in (last, last + 1), "the round in progress was lost"
        run.start("coordinator", "coordinator", str(config), "--directory", str(tmp_path / "run" / "coordinator"))
        run.wait("coordinator", Notice, lambda event: "standing by" in event.text)
        run.wait("standby", RoundCertified, lambda event: event.round > first.round + 1)
        os.kill(run.processes["standby"].pid, signal.SIGSTOP)  # a frozen leader does not notice that its lease ends
        cut = run.events("standby", RoundCertified)[-1].round
        run.wait("coordinator", RoundCertified, lambda event: event.round > cut + 1)
        os.kill(run.processes["standby"].pid, signal.SIGCONT)
        run.wait("standby", Notice, lambda event: "another coordinator leads" in event.text)
        seen = run.events("coordinator", RoundCertified)[-1].round
        run.wait("coordinator", RoundCertified, lambda event: event.round > seen + 1)
        for name in (*NAMES, "coordinator", "standby"):
            run.kill(name, signal.SIGINT)
    check_one_chain(tmp_path / "run")


def start(run: Swarm) -> None:
    run.coordinator()
    run.standby("standby")
    for name in NAMES:
        run.node(name)


def check_one_chain(directory: Path) -> None:
    """Check that all ledgers are valid and agree."""
    manifest = Manifest.decode((directory / "coordinator" / MANIFEST).read_bytes())
    roots: dict[int, set[str]] = {}
    for name in (*NAMES, "coordinator", "standby"):
        verify_ledger(directory / name / LEDGER, manifest)
    for name in NAMES:
        for round_number, root in enumerate(certified_roots(directory / name / "events.jsonl"), 1):
            roots.setdefault(round_number, set()).add(root)
    assert all(len(found) == 1 for found in roots.values())


def test_a_standby_continues_the_round_of_a_killed_coordinator(tmp_path: Path) -> None:
    config = two_coordinators(tmp_path, members=2)
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        run.standby("standby")
        for name in NAMES[:2]:
            run.node(name)
        run.wait("coordinator", RoundCertified)
        run.kill("coordinator")
        last = run.events("coordinator", RoundCertified)[-1].round
        first = run.wait("standby", RoundCertified)
        assert first.round in (last, last + 1), "a round was lost"
        for name in (*NAMES[:2], "standby"):
            run.kill(name, signal.SIGINT)
        roots = [certified_roots(tmp_path / "run" / name / "events.jsonl")[: first.round] for name in NAMES[:2]]
        assert roots[0] == roots[1]


@pytest.mark.slow
def test_a_standby_that_the_launch_did_not_name_is_refused_with_instructions(tmp_path: Path) -> None:
    config = write_config(tmp_path, members=1)
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        run.standby("standby")
        assert run.join("standby") == 1
        assert "is not a coordinator of the run tiny: its launch names them, under run.standbys" in run.output(
            "standby"
        )
        run.kill("coordinator", signal.SIGINT)
