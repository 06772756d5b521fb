"""Reducers that die, freeze, lie or withhold their results in the middle of a reduction, as real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from psyche.telemetry.events import PeerLeft, Rejected, RoundCertified
from tests.processes.faulty_reducer import FIRST
from tests.processes.swarm import swarm
from tests.processes.test_faults import QUICK, ROUNDS, stop_and_compare
from tests.tiny import LARGER, write_config

HONEST = ["node-1", "node-2", "node-3", "node-4"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "freeze", "lie", "withhold"])
def test_the_other_reducers_finish_the_round_of_a_faulty_one(tmp_path: Path, fault: str) -> None:
    config = write_config(
        tmp_path,
        members=5,
        model=LARGER,
        rounds=ROUNDS | {"inner_steps": 10, "total": 500, "start_members": 5},
        deadlines=QUICK,
        exchange={"kind": "sharded", "reducers": 2},
    )
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        for name in HONEST:
            run.node(name)
        run.node("node-5", fault, module="tests.processes.faulty_reducer")
        run.wait("coordinator", RoundCertified, lambda event: event.round == FIRST + 2)
        if fault == "kill":
            assert run.join("node-5") == -signal.SIGKILL
        if fault in ("kill", "freeze"):
            gone = run.wait("coordinator", PeerLeft)
            later = run.wait("coordinator", RoundCertified, lambda event: event.round > gone.round)
            assert len(later.accepted) == 4
        if fault == "lie":
            named = run.wait("coordinator", Rejected, lambda event: event.what == "result")
            own = run.wait("node-5", Rejected, lambda event: event.what == "result")
            assert own.peer == named.peer
        if fault == "freeze":
            os.kill(run.processes["node-5"].pid, signal.SIGKILL)
        stop_and_compare(run, HONEST)
