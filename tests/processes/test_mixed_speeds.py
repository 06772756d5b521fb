"""Real nodes of different speeds, one that stalls, and one whose machine becomes busy."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from psyche.bench.harness.paced_engine import PACE
from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.store import Ledger
from psyche.protocol.chain import claimed
from psyche.protocol.messages import Record
from psyche.telemetry.events import Leaving, PeerJoined, PeerLeft, RoundCertified, RoundStarted, RunFinished, StepDone
from tests.processes.busy_machine import IN_USE
from tests.processes.swarm import Swarm, swarm
from tests.tiny import certified_roots, load_config, reference_roots, write_config

PACED = "psyche.bench.harness.paced_engine"
DEADLINES = {"round_min": 60.0, "round_max": 90.0, "exchange_min": 5.0, "exchange_max": 20.0, "silence": 15.0}


class Paced(Swarm):
    """A swarm whose nodes take a fixed time per step."""

    def __init__(self, directory: Path, config: Path, seconds: dict[str, float]) -> None:
        super().__init__(directory, config)
        self.seconds = seconds

    def environment(self, name: str) -> dict[str, str]:
        return {PACE: str(self.seconds.get(name, 0.0)), IN_USE: str(self.directory / "in use")}

    def record(self, round_number: int) -> Record:
        with Ledger.read(self.directory / "coordinator" / LEDGER) as ledger:
            (entry,) = (entry for entry in ledger.entries() if entry.round == round_number)
        return claimed(entry.certificate).record


@pytest.fixture
def paced(tmp_path: Path) -> Iterator[Paced]:
    """A coordinator with H = 20; the nodes that a test starts take 0.1, 0.2 and 0.4 s per step."""
    rounds = {"inner_steps": 20, "total": 8, "start_members": 3, "min_members": 2}
    config = write_config(tmp_path, members=3, rounds=rounds, deadlines=DEADLINES)
    with swarm(tmp_path / "run", config) as plain:
        running = Paced(plain.directory, config, {"node-1": 0.1, "node-2": 0.2, "node-3": 0.4})
        running.processes = plain.processes  # so that they are reaped
        running.coordinator()
        yield running


def quotas(record: Record) -> list[int]:
    return sorted(member.inner_steps for member in record.plan.members)


@pytest.mark.slow
def test_quotas_follow_speeds_and_the_reference_replays_the_run(paced: Paced) -> None:
    """Quotas are equal in the first round; afterwards a node twice as fast gets twice the steps."""
    for name in paced.seconds:
        paced.node(name, module=PACED)
    paced.wait("coordinator", RunFinished)
    for name in paced.seconds:
        assert paced.join(name) == 0
    assert quotas(paced.record(1)) == [20, 20, 20]
    for number in range(4, 9):
        slow, middle, fast = quotas(paced.record(number))
        assert fast == 20
        assert 3 <= slow <= 7
        assert 7 <= middle <= 13
    given = {one.node: one.contribution for one in paced.record(8).accepted}
    assert all(one.tokens == one.inner_steps * 64 for one in given.values()), "weights follow tokens"
    roots = certified_roots(paced.directory / "coordinator" / "events.jsonl")
    assert reference_roots(paced.directory, load_config(paced.config)) == roots


@pytest.mark.slow
def test_a_stalled_node_returns_the_steps_it_has_not_done(paced: Paced) -> None:
    paced.seconds = dict.fromkeys(paced.seconds, 0.2)
    for name in paced.seconds:
        paced.node(name, module=PACED)
    paced.wait("node-2", StepDone, lambda event: event.round == 3 and event.step > 1)
    stalled = paced.processes["node-2"]
    stalled.send_signal(signal.SIGSTOP)
    paced.wait("node-1", StepDone, lambda event: event.round == 3 and event.step > 15)
    time.sleep(6)  # less than silence; the others are done and wait
    stalled.send_signal(signal.SIGCONT)
    paced.wait("coordinator", RoundCertified, lambda event: event.round == 3)
    record, me = paced.record(3), paced.wait("node-2", RoundStarted).node
    due = record.plan.member(me)
    done = {one.node: one.contribution for one in record.accepted}
    assert set(done) == {member.node for member in record.plan.members}, "a member was excluded"
    assert due is not None
    assert 0 < done[me].inner_steps < due.inner_steps
    assert done[me].tokens == done[me].inner_steps * 64
    paced.wait("coordinator", RoundCertified, lambda event: event.round == 4)
    again = paced.record(4).plan.member(me)
    assert again is not None
    assert again.inner_steps <= done[me].inner_steps


@pytest.mark.slow
def test_a_node_on_a_busy_machine_submits_leaves_and_comes_back(paced: Paced) -> None:
    paced.seconds["node-3"] = 1.0
    for name in ("node-1", "node-2"):
        paced.node(name, module=PACED)
    paced.node("node-3", module="tests.processes.busy_machine")
    paced.wait("node-3", StepDone, lambda event: event.round == 1 and event.step > 1)
    flag = paced.directory / "in use"
    flag.touch()
    asked = paced.wait("node-3", Leaving)
    gone = paced.wait("coordinator", PeerLeft)
    assert (gone.peer, gone.reason) == (asked.node, "it rests: this machine is in use")
    done = {one.node: one.contribution.inner_steps for one in paced.record(1).accepted}
    assert 0 < done[asked.node] < 20
    started = paced.wait("coordinator", RoundStarted, lambda event: event.round == 3)
    assert asked.node not in started.members, "the plan includes a node that left"
    assert paced.processes["node-3"].poll() is None
    flag.unlink()
    paced.wait("coordinator", PeerJoined, lambda event: event.peer == asked.node and event.time > gone.time)
    paced.wait("coordinator", RoundStarted, lambda event: event.round > 3 and asked.node in event.members)
