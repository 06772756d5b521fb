"""Blob transfers yield the requested bytes, or an error that names the failing peer and the cause."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from swarm import spawn_child, start, until, with_swarm

from psyche.network import blob_server
from psyche.network.bandwidth import BURST_SECONDS, QUANTUM, Limiter
from psyche.network.blob_server import Request
from psyche.network.download import chunk_order
from psyche.network.identity import Identity
from psyche.network.node import NetworkNode
from psyche.network.streams import Stream
from psyche.network.transport import BadBlob, FetchError, source_order
from psyche.numerics.digest import CHUNK, BlobIndex, chunked, index_blob, index_chunks, payload_root


def data_for(caller: NetworkNode, order: list[str], size: int) -> bytes:
    """Return random bytes for which ``caller`` tries the sources in this order."""
    while True:
        data = os.urandom(size)
        if source_order(order, caller.peer_id, index_blob(data).root) == order:
            return data


def recorded(data: bytes, asked: list[int]) -> Callable[[int], bytes]:
    """Return a chunk reader that records the requested chunks."""

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
        assert await b.blobs.fetch_bytes(root, sources=[a.peer_id], max_size=size, size=size) == data
        target = bytearray(size)
        await b.blobs.fetch_into(root, target, sources=[b.peer_id, a.peer_id])
        assert target == data
        await until(lambda: a.traffic.bytes_up >= b.traffic.bytes_down)  # counted when written, by another thread
        assert 2 * size < b.traffic.bytes_down == a.traffic.bytes_up < 2 * size + 1000
        a.blobs.remove(root)
        with pytest.raises(FetchError, match="does not have it") as failure:
            await b.blobs.fetch_bytes(root, sources=[a.peer_id], max_size=size)
        assert list(failure.value.reasons) == [a.peer_id]

    with_swarm(tmp_path, 2, scenario)


def test_many_blobs_are_fetched_at_once(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b, c = nodes
        data = [os.urandom(CHUNK + number) for number in range(40)]
        roots = [a.blobs.add_bytes(d) for d in data]
        for d in data:
            b.blobs.add_bytes(d)
        sources = [a.peer_id, b.peer_id]
        fetched = await asyncio.gather(*(c.blobs.fetch_bytes(r, sources=sources, max_size=2 * CHUNK) for r in roots))
        assert fetched == data
        assert min(a.traffic.bytes_up, b.traffic.bytes_up) > 5 * CHUNK  # the load was shared
        assert not a.streams.rejections + b.streams.rejections

    with_swarm(tmp_path, 3, scenario)


def test_chunks_of_a_changed_state_are_not_served(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b = nodes
        state = bytearray(os.urandom(3 * CHUNK))
        index = index_blob(state)
        state[CHUNK] ^= 1
        a.blobs.add(index, list(chunked(state)).__getitem__)
        with pytest.raises(FetchError, match="refused: has only some of the chunks"):
            await b.blobs.fetch_bytes(index.root, sources=[a.peer_id], max_size=3 * CHUNK)

    with_swarm(tmp_path, 2, scenario)


Serve = Callable[[Stream], Awaitable[None]]


async def start_faulty(tmp_path: Path, at: NetworkNode, serve: Serve) -> NetworkNode:
    """Start a node that joined through ``at`` and serves blobs with ``serve``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blob_server.BlobServer, "_serve", lambda self, stream: serve(stream))
        return await start(tmp_path, "malicious", await at.addresses())


async def answer(stream: Stream, claimed: bytes, data: bytes) -> None:
    """Serve any root with this index and chunks of these bytes."""
    frame = await stream.read_request(blob_server.REQUEST_BYTES)
    while frame is not None:
        request = Request.decode(frame)
        await stream.accept()
        if request.index:
            await stream.write_frame(claimed)
        for number in request.chunks:
            await stream.accept()
            await stream.write(data[number * CHUNK : (number + 1) * CHUNK])
        frame = await stream.next_request(blob_server.REQUEST_BYTES)


LIES: dict[str, Callable[[BlobIndex], bytes]] = {
    "a chunk that does not match its hash": lambda index: index.encode(),
    "an index of over 4 chunks": lambda index: index.encode() * 1000,
    "an index that does not match the root": lambda index: BlobIndex((*index.sizes[:-1], 18), index.hashes).encode(),
    "a truncated index": lambda index: index.encode()[:-1],
    "an index with an empty or too large chunk": lambda index: bytes(4) + index.encode()[4:],
}


def test_malicious_sources_are_named_and_the_next_source_continues(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        honest, caller = nodes
        size = 3 * CHUNK + 17
        claimed = b""

        async def lie(stream: Stream) -> None:
            await answer(stream, claimed, bytes(size))

        async with await start_faulty(tmp_path, honest, lie) as malicious:
            sources = [malicious.peer_id, honest.peer_id]
            data = data_for(caller, sources, size)
            index = index_blob(data)
            lies: list[tuple[str, str]] = []
            honest.blobs.add_bytes(data)
            for told, make in LIES.items():
                claimed = make(index)
                fetched = await caller.blobs.fetch_bytes(
                    index.root, sources=sources, max_size=size, on_violation=lambda *lie: lies.append(lie)
                )
                assert fetched == data
                assert lies == [(malicious.peer_id, told)]
                lies.clear()

    with_swarm(tmp_path, 2, scenario)


@pytest.mark.parametrize("limit", [None, 1e8])
def test_a_stalled_source_is_abandoned(tmp_path: Path, limit: float | None) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        honest, caller = nodes
        caller.blobs.download_limit = Limiter(limit)  # waiting for the local limit must not count as a stall

        async def drip(stream: Stream) -> None:
            await stream.read_request(blob_server.REQUEST_BYTES)
            await stream.accept()
            await stream.write_frame(index.encode())
            await stream.read_request(blob_server.REQUEST_BYTES)  # now for the chunk
            await stream.accept()
            await stream.accept()
            for at in range(len(data)):
                await stream.write(data[at : at + 1])
                await asyncio.sleep(0.2)

        async with await start_faulty(tmp_path, honest, drip) as slow:
            both = [slow.peer_id, honest.peer_id]
            data = data_for(caller, both, CHUNK)
            index = index_blob(data)
            honest.blobs.add_bytes(data)
            assert await caller.blobs.fetch_bytes(index.root, sources=both, max_size=2 * CHUNK, stall=3.0) == data
            with pytest.raises(FetchError, match="stalled"):
                await caller.blobs.fetch_bytes(index.root, sources=[slow.peer_id], max_size=2 * CHUNK, stall=1.0)

    with_swarm(tmp_path, 2, scenario)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_another_source_continues_where_a_dead_or_frozen_one_stopped(tmp_path: Path, number: signal.Signals) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        honest, caller = nodes
        child_id = Identity.load_or_create(tmp_path / "child.key").peer_id
        sources = [child_id, honest.peer_id]
        data = data_for(caller, sources, 6 * CHUNK)
        index = index_blob(data)
        asked: list[int] = []
        honest.blobs.add(index, recorded(data, asked))
        second = list(chunk_order(range(6), caller.peer_id, index.root))[1]
        child, daemon, addresses = await asyncio.to_thread(spawn_child, tmp_path, data, second)
        try:
            assert await caller.connect(addresses) == {}
            blob = asyncio.create_task(
                caller.blobs.fetch_blob(index.root, sources=sources, max_chunks=6, chunks=range(6), stall=3.0)
            )
            given = len(index.encode()) + CHUNK  # it hangs on the next chunk
            await until(lambda: child_id in caller.traffic.peers and caller.traffic.peers[child_id].bytes_down > given)
            for pid in (daemon, child.pid):
                os.kill(pid, number)
            whole = await blob
            assert b"".join([whole[chunk] for chunk in range(6)]) == data
            assert asked.count(second) == 1, "a missing chunk came from the other source"
            assert len(asked) < 6, "a received chunk was requested again"
        finally:
            child.kill()
            child.wait()
            with contextlib.suppress(ProcessLookupError):
                os.kill(daemon, signal.SIGKILL)

    with_swarm(tmp_path, 2, scenario)


def test_a_blob_is_assembled_from_sources_with_parts_of_it(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        author, one, other, caller = nodes
        parts = [os.urandom(CHUNK + number) for number in range(6)]
        author.blobs.add_blob(author.blobs.spool.put(parts))
        root = payload_root(parts)
        for node, chunks in ((one, (0, 1, 2)), (other, (3, 4, 5))):
            part = await node.blobs.fetch_blob(root, sources=[author.peer_id], max_chunks=6, chunks=chunks)
            assert not part.complete
        author.blobs.remove(root)
        sources = [author.peer_id, one.peer_id, other.peer_id]
        whole = await caller.blobs.fetch_blob(root, sources=sources, max_chunks=6, chunks=range(6))
        assert [whole[number] for number in range(6)] == parts
        one_more = await one.blobs.fetch_blob(root, sources=[caller.peer_id], max_chunks=6, chunks=(5,))
        assert one_more[5] == parts[5]
        received = caller.traffic.bytes_down
        assert sum(map(len, parts)) < received < 1.02 * sum(map(len, parts)), "a chunk was sent twice"

    with_swarm(tmp_path, 4, scenario)


def test_a_partial_blob_is_served_and_resumed(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        author, caller, third = nodes
        parts = [os.urandom(CHUNK + number) for number in range(6)]
        root = payload_root(parts)
        half = author.blobs.spool.create(index_chunks(parts))
        author.blobs.add_blob(half)
        for number in (0, 2, 5):
            half.write(number, parts[number])
        wanted: dict[str, Any] = {"max_chunks": 6, "stall": 3.0}
        with pytest.raises(FetchError, match="only some of the chunks") as failed:
            await caller.blobs.fetch_blob(root, sources=[author.peer_id], **wanted)
        partial = failed.value.partial
        assert partial is not None
        assert [number for number in range(6) if partial.present(number)] == [0, 2, 5]
        served = await third.blobs.fetch_blob(root, sources=[caller.peer_id], chunks=(2,), **wanted)
        assert served[2] == parts[2]
        for number in (1, 3, 4):
            half.write(number, parts[number])
        whole = await caller.blobs.fetch_blob(root, sources=[author.peer_id], into=partial, **wanted)
        assert whole is partial
        assert [whole[number] for number in range(6)] == parts
        assert caller.traffic.bytes_down < 1.02 * sum(map(len, parts)), "a chunk was sent twice"

    with_swarm(tmp_path, 3, scenario)


@pytest.mark.parametrize("limited", ["max_upload", "max_download"])
def test_a_limit_holds_for_all_transfers_together(tmp_path: Path, limited: str) -> None:
    async def main() -> None:
        rate = 4.0 * CHUNK
        async with await start(tmp_path, "limited", **{limited: rate}) as node:
            options = {"bootstrap": await node.addresses()}
            async with await start(tmp_path, "one", **options) as one, await start(tmp_path, "two", **options) as two:
                givers, takers = ([node, node], [one, two]) if limited == "max_upload" else ([one, two], [node, node])
                data = [os.urandom(CHUNK) for _ in givers]
                roots = [giver.blobs.add_bytes(content) for giver, content in zip(givers, data, strict=True)]
                began = time.monotonic()
                fetched = await asyncio.gather(
                    *(
                        taker.blobs.fetch_bytes(root, sources=[giver.peer_id], max_size=CHUNK)
                        for taker, giver, root in zip(takers, givers, roots, strict=True)
                    )
                )
                assert fetched == data
                burst = max(rate * BURST_SECONDS, QUANTUM)
                assert rate * (time.monotonic() - began) + burst >= 2 * CHUNK

    asyncio.run(main())


def test_invalid_content_is_attributed_to_the_author(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b = nodes
        parts = [b"good", b"bad!"]
        a.blobs.add_blob(a.blobs.spool.put(parts))

        def check(number: int, chunk: bytes) -> None:
            if chunk == b"bad!":
                raise ValueError("it is bad")

        def accept(index: BlobIndex) -> None:
            raise ValueError("two chunks are one too many")

        for reason, wanted in (("it is bad", {"check": check}), ("one too many", {"accept": accept})):
            with pytest.raises(BadBlob, match=reason):
                await b.blobs.fetch_blob(
                    payload_root(parts), sources=[a.peer_id], max_chunks=2, chunks=range(2), **wanted
                )
        with pytest.raises(BadBlob, match="at most 7 expected"):
            await b.blobs.fetch_bytes(a.blobs.add_bytes(b"too long"), sources=[a.peer_id], max_size=7)

    with_swarm(tmp_path, 2, scenario)


def test_a_busy_source_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob_server, "UPLOADS", 1)

    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b = nodes
        root = a.blobs.add_bytes(data := os.urandom(CHUNK))
        async with b.streams.open(a.peer_id, "blob"):
            await until(lambda: a.streams.served("blob", b.peer_id) == 1)
            transfer = asyncio.create_task(b.blobs.fetch_bytes(root, sources=[a.peer_id], max_size=CHUNK))
            await until(lambda: a.streams.rejections["blob: busy"] >= 2)
        assert await transfer == data

    with_swarm(tmp_path, 2, scenario)


def test_a_blob_added_twice_must_be_removed_twice(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b = nodes
        root = a.blobs.add_bytes(b"same")
        a.blobs.add_bytes(b"same")
        a.blobs.add(index_blob(b"same"), lambda number: b"else")  # its content no longer matches, so it is skipped
        for _ in range(2):
            assert await b.blobs.fetch_bytes(root, sources=[a.peer_id], max_size=4) == b"same"
            a.blobs.remove(root)
        with pytest.raises(FetchError, match="only some of the chunks"):
            await b.blobs.fetch_bytes(root, sources=[a.peer_id], max_size=4)

    with_swarm(tmp_path, 2, scenario)


def test_an_unhashed_blob_is_served_only_if_it_matches_its_root(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b = nodes
        asked: list[int] = []
        right, wrong = index_blob(b"right"), index_blob(b"wrong").root

        def gone() -> BlobIndex:
            raise FileNotFoundError

        def load() -> BlobIndex:
            asked.append(1)
            return right

        a.blobs.add_unread(right.root, load, lambda number: b"right")
        a.blobs.add_unread(wrong, gone, lambda number: b"wrong")
        assert not asked
        for _ in range(2):
            assert await b.blobs.fetch_bytes(right.root, sources=[a.peer_id], max_size=5) == b"right"
        assert len(asked) == 1
        with pytest.raises(FetchError, match="does not have it"):
            await b.blobs.fetch_bytes(wrong, sources=[a.peer_id], max_size=5)

    with_swarm(tmp_path, 2, scenario)


def test_callers_start_with_different_sources() -> None:
    sources = [f"source{number}" for number in range(8)]
    orders = [source_order(sources, f"caller{number}", b"root") for number in range(100)]
    assert len({order[0] for order in orders}) == 8
    assert all(sorted(order) == sources for order in orders)
    assert source_order([*sources, *sources], "source3", b"root").count("source3") == 0


def test_a_fetch_without_sources_is_an_error(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        with pytest.raises(FetchError, match="no peer is known to have it"):
            await nodes[0].blobs.fetch_bytes(bytes(32), sources=[nodes[0].peer_id], max_size=1)

    with_swarm(tmp_path, 1, scenario)
