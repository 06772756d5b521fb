"""A node that leaves submits what it can and reports the outcome, and signals reach no other process."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from psyche.bench.harness.paced_engine import PACE
from psyche.errors import PsycheError
from psyche.exchange.rules import rules_of
from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.store import Ledger
from psyche.processes.process_lock import LOCK, process_of, registered
from psyche.protocol.chain import claimed
from psyche.protocol.contributions import contribution_fault
from psyche.protocol.messages import Contribution
from psyche.telemetry.events import Leaving, Left, PeerLeft, PhaseChanged, RoundCertified, RoundStarted, StepDone
from tests.diloco.test_overlap import alone, plan_for
from tests.processes.swarm import PATIENCE, Swarm, swarm
from tests.tiny import write_config

SLOW = "psyche.bench.harness.paced_engine"
DEADLINES = {"round_min": 60.0, "round_max": 90.0, "exchange_min": 5.0, "exchange_max": 20.0, "silence": 10.0}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Swarm]:
    """A coordinator, node-1, which finishes a round at once, and a slow node that takes a minute.

    The slow node stops early when the others wait only for it, so a test starts a second slow one.
    """
    monkeypatch.setenv(PACE, "1.0")
    rounds = {"inner_steps": 60, "total": 500, "start_members": 3, "min_members": 1}
    config = write_config(tmp_path, members=3, rounds=rounds, deadlines=DEADLINES)
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        run.node("node-1")
        run.node("node-3", module=SLOW)
        yield run


def leave(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "psyche", "leave", str(directory), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def contribution(run: Swarm, round_number: int, node: str) -> Contribution | None:
    """Return ``node``'s contribution to a round from the coordinator's ledger, or None."""
    peer = run.events(node, Leaving)[0].node
    with Ledger.read(run.directory / "coordinator" / LEDGER) as ledger:
        (entry,) = (entry for entry in ledger.entries() if entry.round == round_number)
    return {one.node: one.contribution for one in claimed(entry.certificate).record.accepted}.get(peer)


@pytest.mark.slow
def test_a_node_that_leaves_while_training_submits_the_steps_it_has_done(run: Swarm) -> None:
    run.node("node-2", module=SLOW)
    run.wait("node-2", StepDone)
    assert "is no node that has joined: a coordinator or a standby" in refusal(run.directory / "coordinator")
    done = leave(run.directory / "node-2")
    assert done.returncode == 0, done.stderr
    assert run.join("node-2") == 0, "a node that left gracefully has failed"
    given = contribution(run, 1, "node-2")
    assert given is not None
    assert 0 < given.inner_steps < 60
    gone = run.wait("coordinator", PeerLeft)
    assert (gone.peer, gone.reason) == (run.events("node-2", Left)[0].node, "it leaves, as it was asked to")
    assert "leaving (at most" in done.stdout
    assert "round 1 is certified, with this node's work" in done.stdout
    run.wait("node-1", RoundCertified, lambda event: event.round == 3)
    assert [len(event.members) for event in run.events("coordinator", RoundStarted)][:3] == [3, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["--now", "Ctrl-C"])
def test_ctrl_c_submits_work_that_the_others_wait_for(run: Swarm, asked: str) -> None:
    run.node("node-2", module=SLOW)
    run.wait("node-1", PhaseChanged, lambda event: event.phase == "committing")
    run.wait("node-2", StepDone, lambda event: event.step > 1)
    if asked == "--now":
        assert leave(run.directory / "node-2", "--now").returncode == 0
        assert run.join("node-2") == 130
    else:
        assert run.kill("node-2", signal.SIGINT) == 130
    assert contribution(run, 1, "node-2") is not None
    assert "Traceback" not in run.output("node-2")


@pytest.mark.slow
def test_a_second_ctrl_c_stops_waiting_for_the_round(run: Swarm) -> None:
    """The first Ctrl-C waits for the round in the exchange; the slow node, which still trains, waits 5 s at most."""
    run.node("node-2", module=SLOW)
    run.wait("node-1", PhaseChanged, lambda event: event.phase == "exchanging")
    node = run.processes["node-1"]
    node.send_signal(signal.SIGINT)
    assert run.wait("node-1", Leaving).seconds > 0
    node.send_signal(signal.SIGINT)
    assert run.join("node-1") == 128 + signal.SIGINT
    assert not run.events("node-1", Left)
    assert run.kill("node-2", signal.SIGINT) == 130
    (asked,) = run.events("node-2", Leaving)
    assert asked.seconds in (0.0, 5.0)  # node-1's commitment may still count


@pytest.mark.slow
def test_ctrl_c_ends_a_graceful_leave_at_once(run: Swarm) -> None:
    run.node("node-2", module=SLOW)
    run.wait("node-1", PhaseChanged, lambda event: event.phase == "exchanging")
    asking = subprocess.Popen([sys.executable, "-m", "psyche", "leave", str(run.directory / "node-1")])
    run.wait("node-1", Leaving)
    assert asking.poll() is None, "the command ended before the node left"
    assert run.kill("node-1", signal.SIGINT) == 130
    assert asking.wait(PATIENCE) == 0
    assert [event.seconds > 10 for event in run.events("node-1", Leaving)] == [True, False]


# ------------------------------------------------------------------------------ what is submitted


def test_a_contribution_with_fewer_inner_steps_than_assigned_is_valid(tmp_path: Path) -> None:
    one = alone(tmp_path, rounds={"total": 4, "inner_steps": 8, "start_members": 1})
    plan, taken = plan_for(one), []
    work = one.train(plan, on_step=lambda step, loss, lr: taken.append(step), stop_early=lambda: len(taken) >= 3)
    assert taken == [0, 1, 2]
    assert (work.contribution.inner_steps, work.contribution.tokens) == (3, 3 * one.run.tokens_per_step)
    assert contribution_fault(rules_of(one.manifest), plan, plan.members[0], work.contribution) is None


def test_a_node_that_stops_before_its_first_step_takes_one(tmp_path: Path) -> None:
    one = alone(tmp_path)
    assert one.train(plan_for(one), stop_early=lambda: True).contribution.inner_steps == 1


# ------------------------------------------------------------------------- which process is signalled


def refusal(directory: Path) -> str:
    with pytest.raises(PsycheError) as caught, process_of(directory) as running:
        running.send(signal.SIGTERM)
    return str(caught.value)


def test_no_process_is_signalled_when_no_node_runs(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"no node runs in {tmp_path}: it has left, or it was joined")
    (tmp_path / LOCK).write_text(str(os.getpid()))  # the content does not matter, only the lock
    assert refusal(tmp_path).startswith(f"no node runs in {tmp_path}")

    async def once() -> None:
        async with registered(tmp_path):
            pass

    asyncio.run(once())
    assert refusal(tmp_path).startswith(f"no node runs in {tmp_path}")
    done = leave(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"psyche: no node runs in {tmp_path}")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can change its user")
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_the_refusal_for_another_users_node_names_a_way_to_signal_it(mode: int) -> None:
    directory = Path(tempfile.mkdtemp())
    directory.chmod(mode)

    async def ask() -> str:
        async with registered(directory):
            return refusal_for_nobody(directory)

    try:
        text = asyncio.run(ask())
    finally:
        shutil.rmtree(directory)
    assert str(directory) in text
    assert text.endswith("run this command as root")


def refusal_for_nobody(directory: Path) -> str:
    """Return the error for a process of the user nobody that tries to signal the node in ``directory``."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(65534, 65534, 65534)
            os.write(write, refusal(directory).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text
