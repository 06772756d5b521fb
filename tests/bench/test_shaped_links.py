"""Shaped links: their rates, and that no namespace is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from psyche.bench.harness import shaped_links
from psyche.bench.harness.shaped_links import Link, Place, burst_bytes, namespaces, queue_bytes, remove_stale, shaped
from psyche.errors import PsycheError

RECEIVER = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 5000))
print(flush=True)
connection, _ = server.accept()
received = 0
while piece := connection.recv(1 << 20):
    received += len(piece)
print(received, time.monotonic(), flush=True)
"""
SENDER = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 5000))
print(time.monotonic(), flush=True)
connection.sendall(bytes(int(sys.argv[2])))
"""


def _can_shape() -> bool:
    """Whether this machine lets us: root alone is not enough in a container."""
    if os.geteuid() != 0 or not all(shutil.which(tool) for tool in ("ip", "tc")):
        return False
    try:
        with shaped([Link(10**7, 10**7)]):
            return True
    except PsycheError:
        return False


needs_namespaces = pytest.mark.skipif(not _can_shape(), reason="needs root, network namespaces and tc tbf")


@pytest.mark.parametrize("bits", [10**6, 10**7, 10**8, 10**9])
def test_a_burst_is_at_least_a_few_frames_and_never_fakes_a_transfer(bits: int) -> None:
    assert burst_bytes(bits) >= 3 * shaped_links.FRAME
    assert burst_bytes(bits) <= max(0.01 * 500_000, 0.001 * bits / 8)
    assert queue_bytes(bits) > burst_bytes(bits)


def test_without_root_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PsycheError, match="need root"), shaped([Link()]):
        pass


def test_without_tc_the_error_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(PsycheError, match="apt-get install iproute2"), shaped([Link()]):
        pass


@needs_namespaces
def test_no_transfer_is_faster_than_the_slower_end_and_each_direction_has_its_own_rate() -> None:
    size = 500_000
    with shaped([Link(up=10**8, down=2 * 10**7), Link(up=10**7, down=10**8)]) as (one, other):
        forth, back = _transfer(one, other, size), _transfer(other, one, size)
    assert forth >= 0.98 * 8 * size / 10**8
    assert back >= 0.98 * 8 * size / 10**7, "what the second sends is shaped to 10 Mbit/s"


@needs_namespaces
def test_nothing_is_left_when_the_block_is_left_even_by_an_error() -> None:
    before = namespaces()
    left = shaped([Link(), Link(10**6, 10**6)])
    places = left.__enter__()
    assert len(namespaces()) == len(before) + 3, "a namespace for each, and the bridge's"
    assert [place.namespace in namespaces() for place in places] == [True, True]
    left.__exit__(RuntimeError, RuntimeError(), None)
    assert namespaces() == before


@needs_namespaces
def test_what_a_killed_run_left_behind_is_removed_and_a_living_ones_is_not() -> None:
    program = (
        "from psyche.bench.harness.shaped_links import *\n"
        "with shaped([Link()]) as (place,):\n    print(place.namespace, flush=True)\n    input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        remove_stale()
        assert name in namespaces(), "its owner lives"
        process.send_signal(signal.SIGKILL)
    assert name in namespaces()
    remove_stale()
    assert name not in namespaces()


def _transfer(sender: Place, receiver: Place, size: int) -> float:
    """Seconds from the first byte's sending until the last one's arrival."""
    command = receiver.command([sys.executable, "-c", RECEIVER, receiver.address])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        send = sender.command([sys.executable, "-c", SENDER, receiver.address, str(size)])
        began = float(subprocess.run(send, capture_output=True, text=True, check=True).stdout)
        received, ended = process.stdout.readline().split()
    assert int(received) == size
    assert began < time.monotonic()
    return float(ended) - began
