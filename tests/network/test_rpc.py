"""RPC: calls, refusals with their reasons, and limits on malicious peers."""

import asyncio
import contextlib
from pathlib import Path

import pytest
from swarm import spawn_child, start, until, with_swarm

from psyche.errors import PsycheError
from psyche.network import rpc, streams
from psyche.network.node import NetworkNode
from psyche.network.transport import Busy, Refused, Unreachable, Violation

STRANGER = "12D3KooWFSX9rPxi5p8zYYzETNrXG8a7d7bHTxcQW3SGSkKiB9Qh"


async def echo(peer_id: str, request: bytes) -> bytes:
    return peer_id.encode() + request


def test_a_call_carries_the_callers_peer_id_and_all_bytes(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b, c = nodes
        await b.rpc.serve("echo", echo, max_request=1 << 20)
        for request in (b"", b"x", bytes(1 << 20)):
            reply = await a.rpc.call(b.peer_id, "echo", request, timeout=10, max_reply=(1 << 20) + 52)
            assert reply == a.peer_id.encode() + request
        # c met b through a only: its address comes from the DHT
        assert await c.rpc.call(b.peer_id, "echo", b"", timeout=10, max_reply=52) == c.peer_id.encode()
        assert b.traffic.bytes_down > 1 << 20 < b.traffic.bytes_up
        assert b.traffic.bytes_up == a.traffic.bytes_down + c.traffic.bytes_down
        many = (a.rpc.call(b.peer_id, "echo", b"%d" % n, timeout=30, max_reply=99) for n in range(100))
        assert await asyncio.gather(*many) == [a.peer_id.encode() + b"%d" % n for n in range(100)]
        assert not b.streams.rejections

    with_swarm(tmp_path, 3, scenario)


def test_refusals_carry_their_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def no(peer_id: str, request: bytes) -> bytes:
        raise Refused(request.decode(), "over")

    async def bug(peer_id: str, request: bytes) -> bytes:
        raise KeyError("secret")

    async def full(peer_id: str, request: bytes) -> bytes:
        raise OSError(28, "No space left on device") if request else PsycheError("no space left")

    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b = nodes
        await b.rpc.serve("no", no, max_request=1000)
        await b.rpc.serve("bug", bug, max_request=1000)
        await b.rpc.serve("full", full, max_request=1000)
        for text, told in (("round 7 is over", "round 7 is over"), ("é" * 400, "é" * (streams.MAX_REASON // 2))):
            with pytest.raises(Refused) as refusal:
                await a.rpc.call(b.peer_id, "no", text.encode(), timeout=10, max_reply=10)
            assert (str(refusal.value), refusal.value.code) == (told, "over")
        with pytest.raises(Refused, match=r"^internal error$"):
            await a.rpc.call(b.peer_id, "bug", b"", timeout=10, max_reply=10)
        assert "Traceback" in caplog.text
        caplog.clear()
        for request, told in ((b"1", "[Errno 28] No space left on device"), (b"", "no space left")):
            with pytest.raises(Refused, match=r"^internal error$"):
                await a.rpc.call(b.peer_id, "full", request, timeout=10, max_reply=10)
            assert f"full cannot be answered: {told}" in caplog.text
        assert "Traceback" not in caplog.text
        with pytest.raises(Refused, match="does not serve else"):
            await a.rpc.call(b.peer_id, "else", b"", timeout=10, max_reply=10)
        with pytest.raises(Refused, match="over the limit of 1000 bytes"):
            await a.rpc.call(b.peer_id, "no", bytes(1001), timeout=10, max_reply=10)
        assert b.streams.rejections["no: round 7 is over"] == 1
        assert b.streams.rejections["bug: internal error"] == 1
        assert b.streams.rejections["no: a message over the limit of 1000 bytes"] == 1

    with_swarm(tmp_path, 2, scenario)


def test_a_reply_is_bounded(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b = nodes

        async def oversized(stream: streams.Stream) -> None:
            await stream.read_request(10)
            await stream.accept()
            await stream.write(b"\xff\xff\xff\xff")

        await b.rpc.serve("echo", echo, max_request=10)
        await b.streams.serve("oversized", oversized, at_once=1)
        with pytest.raises(Violation, match="over the limit of 51"):
            await a.rpc.call(b.peer_id, "echo", b"", timeout=10, max_reply=51)
        with pytest.raises(Violation, match="over the limit of 99"):
            await a.rpc.call(b.peer_id, "oversized", b"", timeout=10, max_reply=99)

    with_swarm(tmp_path, 2, scenario)


def test_peers_that_do_not_answer_are_named(tmp_path: Path) -> None:
    async def never(peer_id: str, request: bytes) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def main() -> None:
        child, _, addresses = spawn_child(tmp_path, b"blob")
        async with await start(tmp_path, "a", addresses) as a, await start(tmp_path, "b", addresses) as b:
            peer_id = addresses[0].rpartition("/")[2]
            await b.rpc.serve("never", never, max_request=10)
            with pytest.raises(Unreachable, match=rf"{b.peer_id} did not answer never within 0\.5 s"):
                await a.rpc.call(b.peer_id, "never", b"", timeout=0.5, max_reply=10)
            child.kill()
            child.wait()
            for gone in (peer_id, STRANGER, "no PeerID"):
                with pytest.raises(Unreachable, match=gone):
                    await a.rpc.call(gone, "echo", b"", timeout=5, max_reply=10)

    asyncio.run(main())


def test_a_slow_caller_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "REQUEST_SECONDS", 0.3)

    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b = nodes
        await b.rpc.serve("echo", echo, max_request=1 << 20)
        async with a.streams.open(b.peer_id, "echo") as stream:
            # The request must be too long to complete before the timeout on any machine: a complete one is answered.
            await stream.write((1 << 20).to_bytes(4, "big"))
            with contextlib.suppress(Unreachable):  # a byte now and then does not help
                while True:
                    await stream.write(b"\x00")
                    await asyncio.sleep(0.1)
        assert b.streams.rejections["echo: was too slow to send its request"] == 1

    with_swarm(tmp_path, 2, scenario)


def test_one_peer_cannot_hold_all_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SERVED_PER_PEER", 2)

    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b, c = nodes
        free = asyncio.Event()

        async def wait(peer_id: str, request: bytes) -> bytes:
            if request == b"wait":
                await free.wait()
            return b"done"

        await b.rpc.serve("wait", wait, max_request=100)
        waiting = [asyncio.create_task(a.rpc.call(b.peer_id, "wait", b"wait", timeout=30, max_reply=9)) for _ in "12"]
        await until(lambda: b.streams.served("wait", a.peer_id) == 2)
        async with a.streams.open(b.peer_id, "wait") as third:
            await third.write_frame(b"more")
            with pytest.raises(Busy):
                await third.expect(10)
        assert await c.rpc.call(b.peer_id, "wait", b"", timeout=10, max_reply=9) == b"done"
        retried = asyncio.create_task(a.rpc.call(b.peer_id, "wait", b"", timeout=30, max_reply=9))
        await until(lambda: b.streams.rejections["wait: busy"] >= 2)
        free.set()
        assert await asyncio.gather(*waiting, retried) == [b"done"] * 3
        a.rpc.close()
        c.rpc.close()
        await until(lambda: not b.streams.served("wait"))

    with_swarm(tmp_path, 3, scenario)


def test_consecutive_calls_share_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "KEPT_SECONDS", 600.0)

    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b = nodes
        dialled = 0
        dial = a.streams.dial

        async def counted(peer_id: str, name: str) -> streams.Stream:
            nonlocal dialled
            dialled += 1
            return await dial(peer_id, name)

        monkeypatch.setattr(a.streams, "dial", counted)

        async def call() -> None:
            assert await a.rpc.call(b.peer_id, "echo", b"x", timeout=10, max_reply=99) == a.peer_id.encode() + b"x"

        await b.rpc.serve("echo", echo, max_request=10)
        for _ in range(5):
            await call()
        assert dialled == 1
        (serving,) = b.streams._tasks
        serving.cancel()  # the server closes the stream that the caller kept
        monkeypatch.setattr(rpc, "KEPT_SECONDS", 0.1)
        await call()
        assert dialled == 2
        await until(lambda: not b.streams._tasks)  # kept streams expire
        monkeypatch.setattr(rpc, "KEPT_SECONDS", 600.0)
        await call()
        assert dialled == 3
        with pytest.raises(Refused):
            await a.rpc.call(b.peer_id, "echo", bytes(11), timeout=10, max_reply=99)
        await call()
        assert dialled == 4, "a refusal ends the stream"

    with_swarm(tmp_path, 2, scenario)


def test_a_closing_node_answers_no_calls(tmp_path: Path) -> None:
    """Its daemon still accepts streams when the threads that would serve them are gone."""

    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b = nodes
        await b.rpc.serve("echo", echo, max_request=10)
        assert await a.rpc.call(b.peer_id, "echo", b"x", timeout=10, max_reply=99)
        await b.streams.close()
        with pytest.raises(Unreachable):
            await a.rpc.call(b.peer_id, "echo", b"x", timeout=10, max_reply=99)

    with_swarm(tmp_path, 2, scenario)


def test_a_caller_that_disconnects_frees_its_slot(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b = nodes
        await b.rpc.serve("echo", echo, max_request=1 << 20)
        for _ in range(2 * streams.SERVED_PER_PEER):
            async with a.streams.open(b.peer_id, "echo") as stream:
                await stream.write((1 << 20).to_bytes(4, "big"))
        assert await a.rpc.call(b.peer_id, "echo", b"", timeout=10, max_reply=99) == a.peer_id.encode()

    with_swarm(tmp_path, 2, scenario)


def test_other_peers_cannot_shut_out_a_preferred_peer(tmp_path: Path) -> None:
    """Before, four free keys blocked a member's uploads with 158 bytes a second."""
    held = asyncio.Event()

    async def hold(stream: streams.Stream) -> None:
        await stream.accept()
        await held.wait()

    async def scenario(nodes: list[NetworkNode]) -> None:
        server, member, *others = nodes
        await server.streams.serve("hold", hold, at_once=4)
        server.prefer(lambda peer_id: peer_id == member.peer_id)

        async def opened(node: NetworkNode) -> streams.Stream:
            stream = await node.streams.dial(server.peer_id, "hold")
            await stream.expect(20.0)
            return stream

        crowd = [await opened(others[0]) for _ in range(4)]
        fair = await opened(others[1])  # a second stranger gets one of the four
        await until(lambda: server.streams.served("hold", others[0].peer_id) == 3)
        with pytest.raises(Busy):
            await opened(others[0])
        mine = [await opened(member) for _ in range(4)]  # a member gets them all
        assert server.streams.served("hold") == server.streams.served("hold", member.peer_id) == 4
        with pytest.raises(Busy):
            await opened(others[1])
        for stream in (*crowd, fair, *mine):
            stream.close()
        held.set()

    with_swarm(tmp_path, 4, scenario)
