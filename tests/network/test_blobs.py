"""Blobs: the bytes that were asked for, or an error that says who failed and how."""

import asyncio
import os
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from swarm import spawn_child, start, until, with_swarm

from psyche.network import blobs
from psyche.network.fetch import FetchError, fetch, fetch_into, rotated
from psyche.network.identity import Identity
from psyche.network.node import NetworkNode
from psyche.network.streams import Stream
from psyche.numerics.digest import CHUNK, BlobIndex, index_blob


def data_for(caller: NetworkNode, order: list[str], size: int) -> bytes:
    """Random bytes for which ``caller`` tries the sources in this order."""
    while True:
        data = os.urandom(size)
        if rotated(order, caller.peer_id, index_blob(data).root) == order:
            return data


def recorded(data: bytes, asked: list[int]) -> Callable[[int], bytes]:
    """A reader of chunks that notes which were asked for."""

    def read(number: int) -> bytes:
        asked.append(number)
        return data[number * CHUNK : (number + 1) * CHUNK]

    return read


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, 3 * CHUNK + 17])
def test_a_blob_arrives_whole(tmp_path: Path, size: int) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b = nodes
        data = os.urandom(size)
        root = a.blobs.add_bytes(data)
        assert await fetch(b, root, sources=[a.peer_id], max_size=size, size=size) == data
        target = bytearray(size)
        await fetch_into(b, root, target, sources=[b.peer_id, a.peer_id])
        assert target == data
        assert 2 * size < b.traffic.bytes_down == a.traffic.bytes_up < 2 * size + 1000
        a.blobs.remove(root)
        with pytest.raises(FetchError, match="does not have it") as failure:
            await fetch(b, root, sources=[a.peer_id], max_size=size)
        assert list(failure.value.reasons) == [a.peer_id]

    with_swarm(tmp_path, 2, scenario)


def test_many_blobs_load_at_once(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b, c = nodes
        data = [os.urandom(CHUNK + number) for number in range(40)]
        roots = [a.blobs.add_bytes(d) for d in data]
        for d in data:
            b.blobs.add_bytes(d)
        sources = [a.peer_id, b.peer_id]
        fetched = await asyncio.gather(*(fetch(c, r, sources=sources, max_size=2 * CHUNK) for r in roots))
        assert fetched == data
        assert min(a.traffic.bytes_up, b.traffic.bytes_up) > 5 * CHUNK  # the load was shared
        assert not a.streams.rejections + b.streams.rejections

    with_swarm(tmp_path, 3, scenario)


def test_state_that_moved_on_is_gone(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b = nodes
        state = bytearray(os.urandom(3 * CHUNK))
        index = index_blob(state)

        def read(number: int) -> memoryview:
            if number == 1:
                state[CHUNK] ^= 1
            return memoryview(state)[number * CHUNK : (number + 1) * CHUNK]

        a.blobs.add(index, read)
        for reason in ("refused: gone", "refused: does not have it"):
            with pytest.raises(FetchError, match=reason):
                await fetch(b, index.root, sources=[a.peer_id], max_size=3 * CHUNK)

    with_swarm(tmp_path, 2, scenario)


Serve = Callable[[Stream], Awaitable[None]]


async def announce(stream: Stream, index: BlobIndex) -> tuple[int, int]:
    """A blob server's first half, for any root: (first chunk, count) that the caller then asks for."""
    await stream.read_request(32)
    await stream.accept()
    await stream.write_frame(index.size.to_bytes(8, "big") + index.hashes)
    first, count = struct.unpack(">QQ", await stream.read(16, 10))
    return first, count


async def start_liar(tmp_path: Path, at: NetworkNode, serve: Serve) -> NetworkNode:
    """A node that joined through ``at`` and serves blobs in its own way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blobs.BlobServer, "_serve", lambda self, stream: serve(stream))
        return await start(tmp_path, "liar", await at.addresses())


LIES: dict[str, Callable[[BlobIndex], BlobIndex]] = {
    "a chunk that does not match its hash": lambda index: index,
    "a blob of another size than agreed": lambda index: BlobIndex(index.size + 1, index.hashes),
    "a message over the limit of 136 bytes": lambda index: BlobIndex(1 << 40, index.hashes * 1000),
    "an index that is not the root's": lambda index: BlobIndex(index.size, bytes(32) + index.hashes[32:]),
    " an index that is not the root's": lambda index: BlobIndex(index.size, index.hashes[:-1]),
}


def test_liars_are_named_and_the_next_source_goes_on(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        honest, caller = nodes
        size = 3 * CHUNK + 17
        claimed = index_blob(b"")

        async def lie(stream: Stream) -> None:
            first, count = await announce(stream, claimed)
            for number in range(first, first + count):
                await stream.accept()
                await stream.write((data if number == 0 else bytes(size))[number * CHUNK : (number + 1) * CHUNK])

        async with await start_liar(tmp_path, honest, lie) as liar:
            sources = [liar.peer_id, honest.peer_id]
            data = data_for(caller, sources, size)
            index = index_blob(data)
            asked: list[int] = []
            lies: list[tuple[str, str]] = []
            honest.blobs.add(index, recorded(data, asked))
            for told, make in LIES.items():
                claimed = make(index)
                fetched = await fetch(
                    caller, index.root, sources=sources, max_size=size, on_liar=lambda *lie: lies.append(lie)
                )
                assert fetched == data
                assert lies.pop() == (liar.peer_id, told.strip())
                assert not lies
        assert asked == [1, 2, 3] + [0, 1, 2, 3] * (len(LIES) - 1)

    with_swarm(tmp_path, 2, scenario)


def test_a_slow_source_is_given_up(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        honest, caller = nodes

        async def drip(stream: Stream) -> None:
            await announce(stream, index)
            await stream.accept()
            for at in range(len(data)):
                await stream.write(data[at : at + 1])
                await asyncio.sleep(0.2)

        async with await start_liar(tmp_path, honest, drip) as slow:
            both = [slow.peer_id, honest.peer_id]
            data = data_for(caller, both, CHUNK + 1)
            index = index_blob(data)
            honest.blobs.add_bytes(data)
            assert await fetch(caller, index.root, sources=both, max_size=2 * CHUNK, stall=1.0) == data
            with pytest.raises(FetchError, match="stalled"):
                await fetch(caller, index.root, sources=[slow.peer_id], max_size=2 * CHUNK, stall=1.0)

    with_swarm(tmp_path, 2, scenario)


def test_a_killed_source_is_replaced_where_it_stopped(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        honest, caller = nodes
        child_id = Identity.load_or_create(tmp_path / "child.key").peer_id
        sources = [child_id, honest.peer_id]
        data = data_for(caller, sources, 6 * CHUNK)
        index = index_blob(data)
        asked: list[int] = []
        honest.blobs.add(index, recorded(data, asked))
        child, _, addresses = await asyncio.to_thread(spawn_child, tmp_path, data, 3)
        assert await caller.connect(addresses) == {}
        transfer = asyncio.create_task(fetch(caller, index.root, sources=sources, max_size=len(data)))
        headers = 1 + 4 + 8 + 6 * 32 + 3
        await until(lambda: caller.traffic.bytes_down == headers + 3 * CHUNK)  # it hangs on the fourth chunk
        child.kill()
        assert await transfer == data
        assert asked == [3, 4, 5]
        child.wait()
        with pytest.raises(FetchError) as failure:
            await fetch(caller, index.root, sources=[child_id], max_size=len(data))
        assert list(failure.value.reasons) == [child_id]

    with_swarm(tmp_path, 2, scenario)


def test_a_busy_source_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "UPLOADS", 1)

    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b = nodes
        root = a.blobs.add_bytes(data := os.urandom(CHUNK))
        async with b.streams.open(a.peer_id, "blob"):
            await until(lambda: a.streams._served["blob", ""] == 1)
            transfer = asyncio.create_task(fetch(b, root, sources=[a.peer_id], max_size=CHUNK))
            await until(lambda: a.streams.rejections["blob: busy"] >= 2)
        assert await transfer == data

    with_swarm(tmp_path, 2, scenario)


def test_what_was_added_twice_is_removed_twice(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b = nodes
        root = a.blobs.add_bytes(b"same")
        a.blobs.add_bytes(b"same")
        a.blobs.add(index_blob(b"same"), lambda number: b"else")  # no longer what it was: skipped, forgotten
        for _ in range(2):
            assert await fetch(b, root, sources=[a.peer_id], max_size=4) == b"same"
            a.blobs.remove(root)
        with pytest.raises(FetchError, match="does not have it"):
            await fetch(b, root, sources=[a.peer_id], max_size=4)

    with_swarm(tmp_path, 2, scenario)


def test_every_caller_starts_elsewhere() -> None:
    sources = [f"source{number}" for number in range(8)]
    orders = [rotated(sources, f"caller{number}", b"root") for number in range(100)]
    assert len({order[0] for order in orders}) == 8
    assert all(sorted(order) == sources for order in orders)
    assert rotated([*sources, *sources], "source3", b"root").count("source3") == 0


def test_no_sources_is_an_error_too(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        with pytest.raises(FetchError, match="nobody is known to have it"):
            await fetch(nodes[0], bytes(32), sources=[nodes[0].peer_id], max_size=1)

    with_swarm(tmp_path, 1, scenario)
