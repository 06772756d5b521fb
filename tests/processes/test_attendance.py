"""A node that rests: while its machine is in use, and outside of its hours."""

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
from psyche.processes import attendance
from psyche.processes.attendance import Calendar, attend
from psyche.processes.idleness import CALM_SECONDS, Idleness, Load, Sampler, Spent, spent
from psyche.training.devices import limit_memory, memory_limit
from psyche.worker.leaving import LeaveRequest

# ------------------------------------------------------------------------------------- the machine


def test_a_machine_is_busy_once_others_have_worked_for_two_samples() -> None:
    machine = Idleness(cores=8)
    assert machine.observe(Load(4.0), 0.0)
    assert machine.observe(Load(0.1), 5.0)
    assert machine.observe(Load(4.0), 10.0), "a page was opened"
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
    machine = Idleness(cores)
    assert [machine.observe(load, now) for now in (0.0, 5.0, 10.0)][-1] is idle


def test_a_machine_is_idle_again_after_minutes_without_work() -> None:
    machine = Idleness(cores=8)
    for now in (0.0, 5.0):
        machine.observe(Load(4.0), now)
    assert not machine.observe(Load(0.0), 10.0)
    assert not machine.observe(Load(0.0), 10.0 + CALM_SECONDS - 1)
    machine.observe(Load(4.0), 10.0 + CALM_SECONDS), "one busy sample: the pause begins anew"
    assert not machine.observe(Load(0.0), 20.0 + CALM_SECONDS)
    assert machine.observe(Load(0.0), 20.0 + 2 * CALM_SECONDS)


def test_what_our_own_processes_take_is_not_others_work() -> None:
    before = Spent(0.0, 1000.0, {1: 50.0, 2: 10.0})
    after = Spent(10.0, 1035.0, {1: 70.0, 3: 5.0})  # 2 has ended, 3 is new: 25 of the 35 seconds are ours
    assert after.cores_of_others(before) == pytest.approx(1.0)
    assert before.cores_of_others(before) == 0.0


def test_loads_are_measured_on_this_machine() -> None:
    """Of a process that is not a child of the one that measures, and of one that is."""
    script = (
        "import psutil, subprocess, sys, time, torch\n"
        "from psyche.processes.idleness import Sampler, spent\n"
        "child = subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
        "sampler, before = Sampler(torch.device('cpu')), spent()\n"
        "used = psutil.Process(child.pid).cpu_times\n"
        "first = used().user\n"
        "while used().user < first + 0.5: time.sleep(0.1)\n"  # by then the stranger, too, has had its turns
        "load, after = sampler.sample(), spent()\n"
        "child.kill(); child.wait()\n"
        "ours = sum(after.ours.values()) - sum(before.ours.values())\n"
        "print(load.cores * (after.at - before.at), ours, after.all - before.all)"
    )
    stranger = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    finally:
        stranger.kill()
        stranger.wait()
    others, ours, everything = map(float, done.stdout.split())
    assert others > 0.05, "a twentieth of a second at least"
    assert ours > 0.4
    assert ours <= everything + 0.1


# ----------------------------------------------------------------------------------------- the stay


def hours_around(now: datetime, *, open_: bool) -> str:
    begin, end = now - timedelta(hours=2), now + timedelta(hours=2)
    return f"{begin:%H:%M}-{end:%H:%M}" if open_ else f"{end:%H:%M}-{begin:%H:%M}"


def test_within_its_hours_a_node_joins_and_ends_with_the_run(tmp_path: Path) -> None:
    node, stays = Node(schedule=hours_around(datetime.now(), open_=True)), []

    async def session() -> None:
        stays.append(1)

    asyncio.run(attend(session, node, tmp_path, LeaveRequest(), print))
    assert stays == [1]


def test_it_leaves_when_its_hours_end_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "LOOK_SECONDS", 0.01)
    said, stays = [], []
    now = datetime.now()
    shut, opened = hours_around(now, open_=False), hours_around(now, open_=True)
    leave_request = LeaveRequest()

    class Changing(Calendar):
        """Open at first, then shut for some looks, then open again."""

        looks = 0

        def _look(self, moment: datetime) -> None:
            self._hours = attendance.Hours.parse(shut if self.looks in range(1, 20) else opened)
            self.looks += 1
            super()._look(moment)

    monkeypatch.setattr(attendance, "Calendar", Changing)

    async def session() -> None:
        assert not leave_request.asked
        stays.append(1)
        if len(stays) < 2:
            await leave_request.wait()
            assert leave_request.resting.startswith("outside of its hours")

    asyncio.run(attend(session, Node(schedule=opened), tmp_path, leave_request, said.append))
    assert len(stays) == 2
    assert [text.partition(",")[0] for text in said] == ["waiting: outside of its hours"]


def test_who_is_asked_to_leave_for_good_does_not_come_back(tmp_path: Path) -> None:
    leave_request, stays = LeaveRequest(), []

    async def session() -> None:
        stays.append(1)
        leave_request.rest("this machine is in use")
        assert leave_request.asked
        leave_request.ask(quickly=True)
        leave_request.rest("this machine is in use")

    node = Node(schedule=hours_around(datetime.now(), open_=True))
    asyncio.run(attend(session, node, tmp_path, leave_request, print))
    assert stays == [1]


def test_without_limits_nothing_is_looked_at(tmp_path: Path) -> None:
    assert not Calendar(Node()).limited
    assert Calendar(Node(idle_only=True)).limited
    assert Calendar(Node(schedule="22:00-07:00")).limited


# ------------------------------------------------------------------------------------- the settings


def test_settings_are_taken_from_the_command_line_and_checked() -> None:
    changed = override_node(Node(), schedule="22:00-07:00", idle_only=True, max_gpu_memory="6gb")
    assert (changed.schedule, changed.idle_only, changed.max_gpu_memory) == ("22:00-07:00", True, "6gb")
    for wrong, reason in (
        ({"schedule": "at night"}, "node.schedule|schedule: .*'at night' are no hours"),
        ({"max_gpu_memory": "6g"}, "max_gpu_memory: .*'6g' is not a size"),
    ):
        with pytest.raises(ConfigError, match=reason):
            override_node(Node(), **wrong)


def test_a_limit_of_gpu_memory_is_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_measurer_sees_itself() -> None:
    assert os.getpid() in spent().ours
    assert Sampler(torch.device("cpu")).sample().gpu == 0.0
