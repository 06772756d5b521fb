"""A node that is asked to leave hands in what it can, says how it went, and nobody else's process hears of it."""

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
def some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Swarm]:
    """A coordinator, node-1, which is done with a round at once, and a slow node that takes a minute, if it is not
    the only one that the others wait for: a test starts another slow one."""
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
    """What the coordinator's ledger has of ``node``'s work in a round."""
    peer = run.events(node, Leaving)[0].node
    with Ledger.read(run.directory / "coordinator" / LEDGER) as ledger:
        (entry,) = (entry for entry in ledger.entries() if entry.round == round_number)
    return {one.node: one.contribution for one in claimed(entry.certificate).record.accepted}.get(peer)


@pytest.mark.slow
def test_who_leaves_while_it_trains_hands_in_the_steps_it_has(some: Swarm) -> None:
    some.node("node-2", module=SLOW)
    some.wait("node-2", StepDone)
    assert "is no node that has joined: a coordinator or a standby" in refusal(some.directory / "coordinator")
    done = leave(some.directory / "node-2")
    assert done.returncode == 0, done.stderr
    assert some.join("node-2") == 0, "a node that left as it was asked to has not failed"
    given = contribution(some, 1, "node-2")
    assert given is not None
    assert 0 < given.inner_steps < 60
    gone = some.wait("coordinator", PeerLeft)
    assert (gone.peer, gone.reason) == (some.events("node-2", Left)[0].node, "it leaves, as it was asked to")
    assert "leaving (at most" in done.stdout
    assert "round 1 is certified, with this node's work" in done.stdout
    some.wait("node-1", RoundCertified, lambda event: event.round == 3)
    assert [len(event.members) for event in some.events("coordinator", RoundStarted)][:3] == [3, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["--now", "Ctrl-C"])
def test_ctrl_c_hands_in_what_the_others_wait_for(some: Swarm, asked: str) -> None:
    some.node("node-2", module=SLOW)
    some.wait("node-1", PhaseChanged, lambda event: event.phase == "committing")
    some.wait("node-2", StepDone, lambda event: event.step > 1)
    if asked == "--now":
        assert leave(some.directory / "node-2", "--now").returncode == 0
        assert some.join("node-2") == 130
    else:
        assert some.kill("node-2", signal.SIGINT) == 130
    assert contribution(some, 1, "node-2") is not None
    assert "Traceback" not in some.output("node-2")


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_who_has_a_round_to_train(some: Swarm) -> None:
    """And what is waited for is waited for no longer, once Ctrl-C is pressed again."""
    some.node("node-2", module=SLOW)
    some.wait("node-1", PhaseChanged, lambda event: event.phase == "exchanging")
    node = some.processes["node-1"]
    node.send_signal(signal.SIGINT)
    assert some.wait("node-1", Leaving).seconds > 0
    node.send_signal(signal.SIGINT)
    assert some.join("node-1") == 128 + signal.SIGINT
    assert not some.events("node-1", Left)
    assert some.kill("node-2", signal.SIGINT) == 130
    (asked,) = some.events("node-2", Leaving)
    assert asked.seconds in (0.0, 5.0)  # the other one's commitment may still count


@pytest.mark.slow
def test_leaving_can_be_hurried(some: Swarm) -> None:
    some.node("node-2", module=SLOW)
    some.wait("node-1", PhaseChanged, lambda event: event.phase == "exchanging")
    asking = subprocess.Popen([sys.executable, "-m", "psyche", "leave", str(some.directory / "node-1")])
    some.wait("node-1", Leaving)
    assert asking.poll() is None, "it shows what it waits for"
    assert some.kill("node-1", signal.SIGINT) == 130
    assert asking.wait(PATIENCE) == 0
    assert [event.seconds > 10 for event in some.events("node-1", Leaving)] == [True, False]


# --------------------------------------------------------------------------------- what is handed in


def test_fewer_inner_steps_than_due_are_a_contribution_all_the_same(tmp_path: Path) -> None:
    one = alone(tmp_path, rounds={"total": 4, "inner_steps": 8, "start_members": 1})
    plan, taken = plan_for(one), []
    work = one.train(plan, on_step=lambda step, loss, lr: taken.append(step), stop_early=lambda: len(taken) >= 3)
    assert taken == [0, 1, 2]
    assert (work.contribution.inner_steps, work.contribution.tokens) == (3, 3 * one.run.tokens_per_step)
    assert contribution_fault(rules_of(one.manifest), plan, plan.members[0], work.contribution) is None


def test_who_has_taken_no_step_takes_one(tmp_path: Path) -> None:
    one = alone(tmp_path)
    assert one.train(plan_for(one), stop_early=lambda: True).contribution.inner_steps == 1


# ---------------------------------------------------------------------------------- who is signalled


def refusal(directory: Path) -> str:
    with pytest.raises(PsycheError) as caught, process_of(directory) as running:
        running.send(signal.SIGTERM)
    return str(caught.value)


def test_where_no_node_runs_nobody_is_signalled(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"no node runs in {tmp_path}: it has left, or it was joined")
    (tmp_path / LOCK).write_text(str(os.getpid()))  # whatever stands in it: only the lock counts
    assert refusal(tmp_path).startswith(f"no node runs in {tmp_path}")

    async def once() -> None:
        async with registered(tmp_path):
            pass

    asyncio.run(once())
    assert refusal(tmp_path).startswith(f"no node runs in {tmp_path}")
    done = leave(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"psyche: no node runs in {tmp_path}")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_another_users_node_is_named_with_its_user(mode: int) -> None:
    directory = Path(tempfile.mkdtemp())
    directory.chmod(mode)

    async def ask() -> str:
        async with registered(directory):
            return refused_to_nobody(directory)

    try:
        text = asyncio.run(ask())
    finally:
        shutil.rmtree(directory)
    assert str(directory) in text
    assert text.endswith("run this command as root")


def refused_to_nobody(directory: Path) -> str:
    """What a process of the user nobody is told that would signal the node in ``directory``."""
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
