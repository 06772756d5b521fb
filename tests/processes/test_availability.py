"""A node rests while its machine is in use and outside its scheduled hours."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch

from psyche.config import Node, override_node
from psyche.errors import ConfigError
from psyche.processes import availability
from psyche.processes.availability import Availability, run_when_available
from psyche.processes.idleness import CALM_SECONDS, CpuTime, IdleDetector, Load, LoadSampler, cpu_time
from psyche.training.devices import limit_memory, memory_limit
from psyche.worker.leaving import LeaveRequest

# -------------------------------------------------------------------------------- idle or busy


def test_a_machine_is_busy_once_others_have_worked_for_two_samples() -> None:
    machine = IdleDetector(cores=8)
    assert machine.observe(Load(4.0), 0.0)
    assert machine.observe(Load(0.1), 5.0)
    assert machine.observe(Load(4.0), 10.0), "one busy sample is not work"
    assert not machine.observe(Load(4.0), 15.0)


@pytest.mark.parametrize(
    ("cores", "load", "idle"),
    [
        (2, Load(0.4), True),
        (2, Load(0.6), False),
        (32, Load(3.0), True),
        (32, Load(4.0), False),
        (8, Load(0.1, gpu=0.05), True),
        (8, Load(0.1, gpu=0.5), False),
    ],
)
def test_what_counts_as_work_depends_on_the_machine(cores: int, load: Load, idle: bool) -> None:
    machine = IdleDetector(cores)
    assert [machine.observe(load, now) for now in (0.0, 5.0, 10.0)][-1] is idle


def test_a_machine_is_idle_again_after_minutes_without_work() -> None:
    machine = IdleDetector(cores=8)
    for now in (0.0, 5.0):
        machine.observe(Load(4.0), now)
    assert not machine.observe(Load(0.0), 10.0)
    assert not machine.observe(Load(0.0), 10.0 + CALM_SECONDS - 1)
    machine.observe(Load(4.0), 10.0 + CALM_SECONDS), "one busy sample: the idle time starts again"
    assert not machine.observe(Load(0.0), 20.0 + CALM_SECONDS)
    assert machine.observe(Load(0.0), 20.0 + 2 * CALM_SECONDS)


def test_cpu_time_of_own_processes_does_not_count_as_load() -> None:
    before = CpuTime(0.0, 1000.0, {1: 50.0, 2: 10.0})
    after = CpuTime(10.0, 1035.0, {1: 70.0, 3: 5.0})  # 2 has ended, 3 is new: 25 of the 35 seconds are ours
    assert after.cores_of_others(before) == pytest.approx(1.0)
    assert before.cores_of_others(before) == 0.0


def test_load_is_measured_on_this_machine() -> None:
    """The load of a foreign process counts, the load of a child does not."""
    script = (
        "import psutil, subprocess, sys, time, torch\n"
        "from psyche.processes.idleness import LoadSampler, cpu_time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
        "sampler, before = LoadSampler(torch.device('cpu')), cpu_time()\n"
        "used = psutil.Process(child.pid).cpu_times\n"
        "first = used().user\n"
        "while used().user < first + 0.5: time.sleep(0.1)\n"  # by then the foreign process has run, too
        "load, after = sampler.sample(), cpu_time()\n"
        "child.kill(); child.wait()\n"
        "ours = sum(after.ours.values()) - sum(before.ours.values())\n"
        "print(load.cores * (after.at - before.at), ours, after.all - before.all)"
    )
    foreign = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    finally:
        foreign.kill()
        foreign.wait()
    others, ours, everything = map(float, done.stdout.split())
    assert others > 0.05, "a twentieth of a second at least"
    assert ours > 0.4
    assert ours <= everything + 0.1


# -------------------------------------------------------------------------------- sessions


def hours_around(now: datetime, *, open_: bool) -> str:
    begin, end = now - timedelta(hours=2), now + timedelta(hours=2)
    return f"{begin:%H:%M}-{end:%H:%M}" if open_ else f"{end:%H:%M}-{begin:%H:%M}"


def test_within_its_hours_a_node_joins_and_stays_to_the_end(tmp_path: Path) -> None:
    node, stays = Node(schedule=hours_around(datetime.now(), open_=True)), []

    async def session() -> None:
        stays.append(1)

    asyncio.run(run_when_available(session, node, tmp_path, LeaveRequest(), print))
    assert stays == [1]


def test_a_node_leaves_when_its_hours_end_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "CHECK_SECONDS", 0.01)
    said, stays = [], []
    now = datetime.now()
    closed, opened = hours_around(now, open_=False), hours_around(now, open_=True)
    leave_request = LeaveRequest()

    class Changing(Availability):
        """Available at first, then not for some checks, then again."""

        checks = 0

        def _check(self, moment: datetime) -> None:
            self._hours = availability.Hours.parse(closed if self.checks in range(1, 20) else opened)
            self.checks += 1
            super()._check(moment)

    monkeypatch.setattr(availability, "Availability", Changing)

    async def session() -> None:
        assert not leave_request.asked
        stays.append(1)
        if len(stays) < 2:
            await leave_request.wait()
            assert leave_request.resting.startswith("outside its scheduled hours")

    asyncio.run(run_when_available(session, Node(schedule=opened), tmp_path, leave_request, said.append))
    assert len(stays) == 2
    assert [text.partition(";")[0] for text in said] == ["waiting: outside its scheduled hours"]


def test_a_node_asked_to_leave_does_not_come_back(tmp_path: Path) -> None:
    leave_request, stays = LeaveRequest(), []

    async def session() -> None:
        stays.append(1)
        leave_request.rest("this machine is in use")
        assert leave_request.asked
        leave_request.ask(quickly=True)
        leave_request.rest("this machine is in use")

    node = Node(schedule=hours_around(datetime.now(), open_=True))
    asyncio.run(run_when_available(session, node, tmp_path, leave_request, print))
    assert stays == [1]


def test_without_limits_nothing_is_checked(tmp_path: Path) -> None:
    assert not Availability(Node()).limited
    assert Availability(Node(idle_only=True)).limited
    assert Availability(Node(schedule="22:00-07:00")).limited


# -------------------------------------------------------------------------------- settings


def test_settings_are_taken_from_the_command_line_and_checked() -> None:
    changed = override_node(Node(), schedule="22:00-07:00", idle_only=True, max_gpu_memory="6gb")
    assert (changed.schedule, changed.idle_only, changed.max_gpu_memory) == ("22:00-07:00", True, "6gb")
    for wrong, reason in (
        ({"schedule": "at night"}, "node.schedule|schedule: .*'at night' is not a range of hours"),
        ({"max_gpu_memory": "6g"}, "max_gpu_memory: .*'6g' is not a size"),
    ):
        with pytest.raises(ConfigError, match=reason):
            override_node(Node(), **wrong)


def test_the_gpu_memory_limit_is_set_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    properties = type("Properties", (), {"total_memory": 24 * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: asked.append(share))
    gpu = torch.device("cuda", 0)
    limit_memory(memory_limit(Node()), gpu)
    limit_memory(memory_limit(Node(max_gpu_memory="6gb")), torch.device("cpu"))
    assert asked == []
    limit_memory(memory_limit(Node(max_gpu_memory="6gb")), gpu)
    limit_memory(memory_limit(Node(max_gpu_memory="48gb")), gpu)
    assert asked == [0.25, 1.0]


def test_the_sampler_sees_its_own_process() -> None:
    assert os.getpid() in cpu_time().ours
    assert LoadSampler(torch.device("cpu")).sample().gpu == 0.0
