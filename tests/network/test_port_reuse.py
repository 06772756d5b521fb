"""A restarted node listens on its last port, so that other nodes find it again."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from psyche.network.address import PORT, save_port, with_last_port
from psyche.network.invite import Invite
from psyche.telemetry.events import Notice, RoundCertified
from tests.processes.swarm import swarm
from tests.tiny import write_config

ANY = ("/ip4/127.0.0.1/tcp/0", "/dns/example.org/tcp/0")
ADDRESSES = [
    "/ip4/203.0.113.9/tcp/4001/p2p/12D3",
    "/ip4/192.168.1.2/tcp/32801/p2p/12D3",
    "/ip4/127.0.0.1/tcp/32801/p2p/12D3",
]


def test_the_last_port_is_reused_when_any_port_is_allowed(tmp_path: Path) -> None:
    assert with_last_port(ANY, tmp_path) == ANY, "there is no saved port"
    save_port(ADDRESSES, tmp_path)
    assert with_last_port(ANY, tmp_path) == ("/ip4/127.0.0.1/tcp/32801", ANY[1])
    chosen = ("/ip4/127.0.0.1/tcp/9000",)
    assert with_last_port(chosen, tmp_path) == chosen


def test_an_occupied_or_invalid_last_port_is_not_reused(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        (tmp_path / PORT).write_text(str(other.getsockname()[1]))
        assert with_last_port(ANY, tmp_path) == ANY
    for damaged in ("", "x", "70000", "-1"):
        (tmp_path / PORT).write_text(damaged)
        assert with_last_port(ANY, tmp_path) == ANY


@pytest.mark.slow
def test_after_a_power_cut_old_invites_work_and_nodes_wait_for_the_coordinator(tmp_path: Path) -> None:
    rounds = {"total": 500, "inner_steps": 5, "start_members": 2}
    with swarm(tmp_path / "run", write_config(tmp_path, members=2, rounds=rounds)) as run:
        run.coordinator()
        run.node("node-1")
        run.node("node-2")
        run.wait("node-1", RoundCertified)
        invite = tmp_path / "run" / "coordinator" / "invite"
        before = invite.read_text()
        run.cut_power()
        invite.write_text(before)
        run.node("node-1")
        run.wait("node-1", Notice, lambda event: "can be reached; trying again" in event.text)
        last = run.events("node-1", RoundCertified)[-1].round
        run.coordinator()
        run.node("node-2")
        run.wait("node-1", RoundCertified, lambda event: event.round > last)
        assert set(Invite.parse(before).addresses) <= set(Invite.parse(invite.read_text()).addresses)
        for name in ("node-1", "node-2", "coordinator"):
            assert run.kill(name, signal.SIGINT) == 130


@pytest.mark.slow
def test_a_new_node_with_a_dead_invite_fails_at_once(tmp_path: Path) -> None:
    with swarm(tmp_path / "run", write_config(tmp_path, members=1)) as run:
        run.coordinator()
        run.wait("coordinator", Notice)
        run.kill("coordinator")
        run.node("node-1")
        assert run.join("node-1") == 1
        assert "bootstrap nodes could be joined" in run.output("node-1")
