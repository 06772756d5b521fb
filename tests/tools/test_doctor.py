"""What is wrong with a machine is found, with a fix; what peers claim only warns."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from psyche.config import MANIFEST, Manifest, Node, load_config
from psyche.data.provision import FoundStore, local_store
from psyche.diloco.launch import launch
from psyche.errors import PsycheError
from psyche.network.connection_probes import Offset, clock_offset, reachable, serve_probes
from psyche.network.discovery import KINDS
from psyche.network.identity import Identity
from psyche.network.node import NetworkNode
from psyche.telemetry.events import RunStarted
from psyche.tools.checks import (
    RANK_BYTES,
    Finding,
    check_clock,
    check_disk,
    check_memory,
    check_rate,
    check_reach,
    check_speed,
    check_versions,
    requirements,
)
from psyche.tools.preflight import check_connection, check_machine, port_of, report_findings
from psyche.training.engine_choice import EngineChoice, choose_engine
from psyche.training.memory import available_memory
from tests.processes.swarm import swarm
from tests.processes.test_bad_input import psyche
from tests.tiny import write_config

PEER = "12D3KooWFSX9rPxi5p8zYYzETNrXG8a7d7bHTxcQW3SGSkKiB9Qh"


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Node]:
    config = load_config(write_config(tmp_path_factory.mktemp("launched"), members=2))
    return launch(config, PEER).manifest, config.node


class TestChecks:
    def test_versions_are_the_pinned_ones(self) -> None:
        assert check_versions().level == "ok"

    def test_disk(self, tmp_path: Path) -> None:
        place = tmp_path / "not" / "yet"
        assert check_disk("it", place, 0, "--directory").level == "ok"
        full = check_disk("it", place, 1 << 60, "--directory")
        assert full.level == "fail"
        assert "--directory" in full.fix
        assert not place.exists()

    def test_memory(self) -> None:
        assert [check_memory("memory", 100, free, "buy more").level for free in (99, 110, 200)] == [
            "fail",
            "warn",
            "ok",
        ]

    def test_the_clock_only_warns(self) -> None:
        assert check_clock(Offset(0.2, 0.1, 3)).level == "ok"
        assert check_clock(Offset(1.8, 1.0, 3)).level == "ok"  # a slow line explains it
        assert check_clock(None).level == "ok"
        off = check_clock(Offset(-40.0, 0.1, 3))
        assert (off.level, "behind" in off.found, "NTP" in off.fix) == ("warn", True, True)

    @pytest.mark.parametrize("relay", [True, False])
    def test_reachability(self, relay: bool) -> None:
        own = [f"/ip4/192.168.1.5/tcp/4001/p2p/{PEER}"]
        assert check_reach(True, "203.0.113.7", 4001, own, relay).level == "ok"
        closed = check_reach(False, "203.0.113.7", 4001, own, relay)
        assert closed.level == "warn"
        assert "ufw allow 4001/tcp" in closed.fix
        assert ("relay" in closed.found) == relay
        assert check_reach(None, "", 4001, own, relay).level == "warn"
        assert check_reach(None, "", 4001, [f"/ip4/8.8.8.8/tcp/4001/p2p/{PEER}"], relay).level == "ok"

    def test_speed_and_line(self, launched: tuple[Manifest, Node]) -> None:
        manifest, _ = launched
        assert check_speed(manifest, 1e6).level == "ok"
        assert check_speed(manifest, 1e-3).level == "warn"
        assert check_rate(manifest, 1 << 20, 1e9, 1 << 18).level == "ok"
        assert check_rate(manifest, 1 << 20, 1.0, 1 << 18).level == "warn"
        assert "too little to measure" in check_rate(manifest, 100, 1.0, 1 << 18).found

    def test_requirements_follow_the_model_and_its_device(self, launched: tuple[Manifest, Node]) -> None:
        manifest, node = launched
        elements = manifest.resolved.flat_size
        gpu = EngineChoice(("cuda:0",), None, False, "")
        on_cpu = requirements(manifest, node, EngineChoice(("cpu",), None, False, ""))
        on_gpu = requirements(manifest, node, gpu)
        all_on_gpu = requirements(manifest, node.model_copy(update={"outer_state": "gpu"}), gpu)
        assert (on_cpu.device, on_gpu.device) == (0, 16 * elements)
        assert on_cpu.host == on_gpu.host + on_gpu.device
        assert all_on_gpu.device == 32 * elements
        four = requirements(manifest, node, EngineChoice(tuple(f"cuda:{n}" for n in range(4)), 3, False, ""))
        assert 16 * elements // 4 < four.device < on_gpu.device
        assert four.host > on_gpu.host + 4 * RANK_BYTES
        assert on_cpu.directory >= 20 * elements * node.checkpoints_kept

    def test_this_machine_is_measured(self, launched: tuple[Manifest, Node], tmp_path: Path) -> None:
        manifest, node = launched
        found = FoundStore(local_store(manifest, node.cache), None, 1 << 60)
        choice = choose_engine(node, manifest.resolved.flat_size, "adamw")
        findings = {one.check: one.level for one in check_machine(manifest, node, choice, tmp_path, found)}
        assert findings["disk: training data"] == "fail"
        assert available_memory() > 0

    def test_failures_raise_and_warnings_are_reported(self) -> None:
        said: list[str] = []
        report_findings([Finding("a", "ok", "well"), Finding("b", "warn", "so so", "fix b")], said.append)
        assert said == ["b: so so; fix b"]
        with pytest.raises(PsycheError, match="c: bad; fix c"):
            report_findings([Finding("c", "fail", "bad", "fix c")], said.append)

    def test_the_port_is_taken_from_a_direct_address(self) -> None:
        relayed = f"/ip4/203.0.113.1/tcp/1/p2p/{PEER}/p2p-circuit/p2p/{PEER}"
        assert port_of([relayed, f"/ip4/10.0.0.1/tcp/77/p2p/{PEER}"]) == 77
        assert port_of([relayed]) == 0


def test_peers_report_their_clock_and_dial_back(tmp_path: Path) -> None:
    async def node(name: str, bootstrap: Any = ()) -> NetworkNode:
        identity = Identity.load_or_create(tmp_path / f"{name}.key")
        return await NetworkNode.create(
            identity, run_id=bytes(32), kinds=KINDS, listen=["/ip4/127.0.0.1/tcp/0"], bootstrap=bootstrap
        )

    async def main() -> None:
        async with await node("a") as a, await node("b", await a.addresses()) as b:
            assert await clock_offset(b, [a.peer_id]) is None  # an older node, or a coordinator that starts
            assert await reachable(b, [a.peer_id], 1) == (None, "")
            await serve_probes(a)
            offset = await clock_offset(b, [a.peer_id])
            assert offset is not None
            assert abs(offset.seconds) <= offset.error + 0.01
            assert await reachable(b, [a.peer_id], port_of(await b.addresses())) == (True, "127.0.0.1")
            with socket.socket() as closed:
                closed.bind(("127.0.0.1", 0))
                assert await reachable(b, [a.peer_id], closed.getsockname()[1]) == (False, "127.0.0.1")
            findings, sure = await check_connection(b, Node())
            assert sure
            assert {one.level for one in findings} == {"ok"}

    asyncio.run(main())


def test_a_lie_about_the_time_is_outvoted_and_nonsense_is_ignored(tmp_path: Path) -> None:
    class Rpc:
        async def call(self, peer: str, name: str, request: bytes, **_: Any) -> bytes:
            import time

            if peer == "nonsense":
                return b"\xff"
            shift = 10**12 if peer == "liar" else 0
            return b"\x01\xff\xff" if name == "reach" else (time.time_ns() + shift).to_bytes(8, "big")

    class Network:
        rpc = Rpc()

    async def main() -> None:
        network: Any = Network()
        offset = await clock_offset(network, ["liar", "a", "b", "nonsense"])
        assert offset is not None
        assert (offset.peers, abs(offset.seconds) < 1) == (3, True)
        assert await reachable(network, ["a"], 1) == (None, "")

    asyncio.run(main())


def test_a_peer_outside_the_local_network_is_believed_first(tmp_path: Path) -> None:
    class Rpc:
        async def call(self, peer: str, *_: Any, **__: Any) -> bytes:
            return {"neighbour": b"\x01192.168.1.5", "far": b"\x008.8.8.8", "odd": b"\x02x"}[peer]

    class Network:
        rpc = Rpc()

    network: Any = Network()
    assert asyncio.run(reachable(network, ["neighbour", "odd"], 1)) == (True, "192.168.1.5")
    assert asyncio.run(reachable(network, ["neighbour", "far", "odd"], 1)) == (False, "8.8.8.8")


class TestTheCommand:
    def test_without_an_invite(self, tmp_path: Path) -> None:
        result = psyche("doctor", "--json", "--directory", str(tmp_path / "node"))
        assert result.returncode == 0, result.stdout + result.stderr
        found = {one["check"]: one["level"] for one in json.loads(result.stdout)}
        assert found["network"] == "ok"
        assert not (tmp_path / "node").exists()

    def test_a_taken_port_fails_with_a_fix(self, tmp_path: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("0.0.0.0", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            result = psyche("doctor", "--port", port, "--directory", str(tmp_path / "node"))
        assert result.returncode == 1
        assert "choose another with --port" in " ".join(result.stdout.split())

    @pytest.mark.slow
    def test_with_an_invite_to_a_run(self, tmp_path: Path) -> None:
        config = write_config(tmp_path, members=1)
        with swarm(tmp_path / "run", config) as run:
            run.coordinator()
            run.wait("coordinator", RunStarted)
            invite = f"@{run.directory / 'coordinator' / 'invite'}"
            result = psyche("doctor", invite, "--json", "--config", str(config), "--directory", str(tmp_path / "node"))
            found = {one["check"]: one for one in json.loads(result.stdout)}
            assert result.returncode == 0, found
            checks = {"clock", "reachability", "run", "memory", "disk: training data", "transfer", "speed"}
            assert checks <= set(found)
            assert {found[check]["level"] for check in checks} <= {"ok", "warn"}
            assert "tokens/s" in found["speed"]["found"]
            assert (run.directory / "coordinator" / MANIFEST).exists()
