"""Starting, joining and stopping nodes: failures are one sentence, and no daemon is left behind."""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

import pytest
from hivemind.dht.routing import DHTID
from hivemind.dht.traverse import traverse_dht
from swarm import LOCAL, spawn_child, start, swarm, until, with_swarm

from psyche.errors import PsycheError
from psyche.network.address import split_address
from psyche.network.identity import Identity, in_use
from psyche.network.node import NetworkNode, configure_logging
from psyche.network.transport import Unreachable

STRANGER = "12D3KooWFSX9rPxi5p8zYYzETNrXG8a7d7bHTxcQW3SGSkKiB9Qh"


def running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_daemon_of_a_killed_node_ends_with_it(tmp_path: Path) -> None:
    child, daemon, _ = spawn_child(tmp_path, b"blob")
    assert running(daemon)
    child.send_signal(signal.SIGKILL)
    child.wait()
    while running(daemon):  # the test's own timeout ends this
        time.sleep(0.01)


def test_a_closed_node_leaves_nothing_behind(tmp_path: Path) -> None:
    async def main() -> None:
        async with await start(tmp_path, "a") as node:
            pid, directory = node._daemon.process.pid, node._daemon._directory
            assert node.alive
            assert running(pid)
            assert directory.stat().st_mode & 0o077 == 0
        assert not node.alive
        assert not running(pid)
        assert not directory.exists()

    asyncio.run(main())


def test_an_abandoned_dht_search_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """hivemind leaves a task unawaited, which asyncio would report when it is collected."""

    async def silent(peer: DHTID, queries: Collection[DHTID]) -> dict[DHTID, tuple[list[DHTID], bool]]:
        await asyncio.sleep(3600)
        return {}

    async def main() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await traverse_dht([DHTID.generate()], [DHTID.generate()], 1, 1, 1, silent)
        gc.collect()
        await asyncio.sleep(0)
        gc.collect()

    configure_logging()
    asyncio.run(main())
    assert not caplog.records


def test_addresses_are_full_and_stable(tmp_path: Path) -> None:
    async def main() -> None:
        async with await start(tmp_path, "a", listen=("/ip4/0.0.0.0/tcp/0",)) as node:
            addresses = await node.addresses()
            assert all(address.endswith(f"/p2p/{node.peer_id}") for address in addresses)
            assert any(address.startswith("/ip4/127.0.0.1/") for address in addresses[-1:])
        async with await start(tmp_path, "a", announce=("/ip4/203.0.113.7/tcp/4001",)) as again:
            assert again.peer_id == node.peer_id
            assert await again.addresses() == [f"/ip4/203.0.113.7/tcp/4001/p2p/{node.peer_id}"]

    asyncio.run(main())


def failure_of(tmp_path: Path, name: str, **options: object) -> str:
    async def main() -> str:
        with pytest.raises(PsycheError) as failure:
            await start(tmp_path, name, **options)  # type: ignore[arg-type]
        return str(failure.value)

    made: list[str] = []

    def recording_mkdtemp(*arguments: object, **options: object) -> str:
        made.append(mkdtemp(*arguments, **options))  # type: ignore[call-overload]
        return made[-1]

    mkdtemp = tempfile.mkdtemp
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", recording_mkdtemp)
        text = asyncio.run(main())
    assert not any(map(os.path.exists, made))
    return text


def test_a_port_taken_by_another_program_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        text = failure_of(tmp_path, "a", listen=(f"/ip4/127.0.0.1/tcp/{port}",))
    assert text == f"port {port} is in use by another program; choose another with --port"


def test_a_port_taken_by_another_node_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with await start(tmp_path, "a") as node:
            address = (await node.addresses())[0].partition("/p2p/")[0]
            with pytest.raises(PsycheError, match="is in use by another program"):
                await start(tmp_path, "b", listen=(address,))

    asyncio.run(main())


def test_a_bad_address_is_named(tmp_path: Path) -> None:
    assert "not valid" in failure_of(tmp_path, "a", listen=("/ip4/127.0.0.999/tcp/0",))
    assert "cannot listen" in failure_of(tmp_path, "a", listen=("/ip4/192.0.2.1/tcp/4001",))
    assert "invalid address" in failure_of(tmp_path, "a", bootstrap=("/ip4/127.0.0.1/tcp/1",))


def test_unreachable_bootstrap_nodes_are_named(tmp_path: Path) -> None:
    addresses = [f"/ip4/127.0.0.1/tcp/1/p2p/{STRANGER}"]
    text = failure_of(tmp_path, "a", bootstrap=addresses)
    assert "connection refused" in text
    assert addresses[0] in text
    assert "ask the run's operator" in text


def test_a_silent_bootstrap_node_does_not_block_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psyche.network.node.BOOTSTRAP_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"/ip4/127.0.0.1/tcp/{mute.getsockname()[1]}/p2p/{STRANGER}"
        assert "no answer" in failure_of(tmp_path, "a", bootstrap=(address,))


def test_another_peer_at_the_bootstrap_address_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with await start(tmp_path, "a") as node:
            address = (await node.addresses())[0].replace(node.peer_id, STRANGER)
            with pytest.raises(PsycheError, match="another peer answers"):
                await start(tmp_path, "b", [address])

    asyncio.run(main())


def test_one_good_bootstrap_node_is_enough(tmp_path: Path) -> None:
    async def main() -> None:
        own = Identity.load_or_create(tmp_path / "b.key").peer_id
        async with await start(tmp_path, "a") as a:
            dead = [f"/ip4/127.0.0.1/tcp/1/p2p/{STRANGER}", f"/ip4/127.0.0.1/tcp/2/p2p/{own}"]
            async with await start(tmp_path, "b", dead + await a.addresses()) as b:
                assert await b.discovery.announce("member", b"b", 60)
                assert await a.discovery.lookup("member") == {b.peer_id: b"b"}

    asyncio.run(main())


def test_a_node_rejoins_after_its_first_bootstrap_node_is_gone(tmp_path: Path) -> None:
    child, _, first = spawn_child(tmp_path, b"blob")

    async def main() -> None:
        async with await start(tmp_path, "a", first) as a:
            assert set(await a.connected()) == {split_address(first[0])[1]}
            child.send_signal(signal.SIGKILL)
            child.wait()
            member = await a.addresses()
            async with await start(tmp_path, "b", [*first, *member]) as b:
                assert await b.discovery.announce("member", b"b", 60)
            async with await start(tmp_path, "b", first, remembered=member) as b:
                assert set(await b.connected()) == {a.peer_id}
                assert await b.discovery.announce("member", b"again", 61)
                assert (await a.discovery.lookup("member"))[b.peer_id] == b"again"

    asyncio.run(main())


def test_the_number_of_unreachable_bootstrap_nodes_is_reported(tmp_path: Path) -> None:
    peers = [Identity.load_or_create(tmp_path / f"{number}.key").peer_id for number in range(6)]
    dead = [f"/ip4/127.0.0.1/tcp/1/p2p/{peer_id}" for peer_id in peers]
    text = failure_of(tmp_path, "a", bootstrap=dead[:1], remembered=dead[1:])
    assert "none of 6" in text
    assert "and 2 more" in text
    assert "psyche invite" in text


def test_a_node_without_bootstrap_nodes_starts_even_if_no_remembered_peer_answers(tmp_path: Path) -> None:
    async def main() -> None:
        async with await start(tmp_path, "a", remembered=[f"/ip4/127.0.0.1/tcp/1/p2p/{STRANGER}"]) as node:
            assert await node.connected() == {}

    asyncio.run(main())


def test_a_node_can_be_its_own_first_bootstrap_node(tmp_path: Path) -> None:
    async def main() -> None:
        own = Identity.load_or_create(tmp_path / "a.key").peer_id
        async with await start(tmp_path, "a", [f"/ip4/127.0.0.1/tcp/1/p2p/{own}"], listen=LOCAL) as node:
            assert node.peer_id == own

    asyncio.run(main())


def test_connect_names_unreachable_peers(tmp_path: Path) -> None:
    async def main() -> None:
        async with swarm(tmp_path, 2) as (a, b):
            reached = await a.connect([*await b.addresses(), f"/ip4/127.0.0.1/tcp/1/p2p/{STRANGER}"])
            assert reached == {STRANGER: "connection refused"}

    asyncio.run(main())


def test_one_key_can_run_only_one_node(tmp_path: Path) -> None:
    async def main() -> None:
        async with await start(tmp_path, "a"):
            assert in_use(tmp_path / "a.key")
            with pytest.raises(PsycheError, match="another psyche runs with the identity"):
                await start(tmp_path, "a")
        assert not in_use(tmp_path / "a.key")
        async with await start(tmp_path, "a"):
            pass

    asyncio.run(main())


def test_a_lost_daemon_is_reported(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b = nodes
        os.kill(a._daemon.process.pid, signal.SIGKILL)
        await until(lambda: not a.alive)
        with pytest.raises(Unreachable, match="daemon is gone"):
            await a.rpc.call(b.peer_id, "echo", b"", timeout=10, max_reply=10)
        with pytest.raises(PsycheError, match="daemon is gone"):
            await a.addresses()

    with_swarm(tmp_path, 2, scenario)
