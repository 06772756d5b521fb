"""Announcements: signed ones are found; forged ones are neither stored nor accepted."""

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID
from swarm import RUN, with_swarm

from psyche.network.node import NetworkNode
from psyche.network.records import MAX_AUTHORS, MAX_TTL, Announcement, RecordTable, record_key, sign_record


async def store(
    attacker: NetworkNode,
    at: NetworkNode,
    value: bytes,
    expires_ms: int,
    subkey: Any,
    kind: str = "member",
    **options: Any,
) -> bool:
    """Ask one node to store a record, as any peer may."""
    key = DHTID.generate(record_key(RUN, kind))
    stored = await attacker.dht.protocol.call_store(
        PeerID.from_base58(at.peer_id), [key], [msgspec.msgpack.encode(value)], expires_ms / 1000, [subkey], **options
    )
    assert len(stored) == 1
    return bool(stored[0])


def test_announcements_are_found_by_all_and_replace_each_other(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        for number, node in enumerate(nodes):
            assert await node.discovery.announce("member", b"%d" % number, 60)
        expected = {node.peer_id: b"%d" % number for number, node in enumerate(nodes)}
        for node in nodes:
            assert await node.discovery.lookup("member") == expected
            assert await node.discovery.lookup("coordinator") == {}
        assert await nodes[1].discovery.announce("member", b"moved", 61)
        assert (await nodes[2].discovery.lookup("member"))[nodes[1].peer_id] == b"moved"
        with pytest.raises(ValueError, match="not declared"):
            await nodes[0].discovery.lookup("else")
        with pytest.raises(ValueError, match="at most"):
            await nodes[0].discovery.announce("member", bytes(2000), 60)

    with_swarm(tmp_path, 3, scenario)


def test_forged_records_are_refused(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b = nodes
        assert await a.discovery.announce("member", b"a", 60)
        attacker = b.discovery._identity
        soon = int((time.time() + 50) * 1000)

        def record(kind: str = "member", run: bytes = RUN, body: bytes = b"forged") -> bytes:
            return sign_record(attacker, run, Announcement(kind, soon, body))

        tampered = bytearray(record())
        tampered[-1] ^= 1
        forged = {
            "under another's name": (record(), soon, a.peer_id),
            "without a name": (record(), soon, None),
            "under a number": (record(), soon, 7),
            "of another run": (record(run=bytes(32)), soon, b.peer_id),
            "of another kind": (record("coordinator"), soon, b.peer_id),
            "made to live longer": (record(), soon + 5000, b.peer_id),
            "tampered with": (bytes(tampered), soon, b.peer_id),
            "that is no envelope": (b"garbage", soon, b.peer_id),
            "that is too big": (record(body=bytes(4000)), soon, b.peer_id),
        }
        for what, (value, expires_ms, subkey) in forged.items():
            assert not await store(b, a, value, expires_ms, subkey), what
        assert not await store(b, a, record("else"), soon, b.peer_id, kind="else")
        assert not await store(b, a, record(), soon, b.peer_id, in_cache=True)
        assert await a.discovery.lookup("member") == {a.peer_id: b"a"}
        assert await store(b, a, record(), soon, b.peer_id)
        assert await a.discovery.lookup("member") == {a.peer_id: b"a", b.peer_id: b"forged"}
        assert not await store(
            b, a, sign_record(attacker, RUN, Announcement("member", soon - 1, b"old")), soon - 1, b.peer_id
        )

    with_swarm(tmp_path, 2, scenario)


def test_forged_records_that_a_node_stores_are_ignored_by_others(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        a, b, c = nodes
        assert await a.discovery.announce("member", b"a", 60)
        late = time.time() + 600
        forged = sign_record(b.discovery._identity, RUN, Announcement("member", int(late * 1000), b"forged"))
        key = DHTID.generate(record_key(RUN, "member"))
        assert b.dht.protocol.storage.store_subkey(key, a.peer_id, msgspec.msgpack.encode(forged), late)
        assert await c.discovery.lookup("member") == {a.peer_id: b"a"}

    with_swarm(tmp_path, 3, scenario)


def test_the_record_table_is_bounded_and_expires_entries() -> None:
    table, key, now = RecordTable(), DHTID.generate("key"), time.time()
    assert not table.store(key, b"no author", now + 60)
    assert not table.store_subkey(key, "late", b"", now - 1)
    assert not table.store_subkey(key, "eternal", b"", now + MAX_TTL + 60)
    assert table.get(key) is None
    for number in range(MAX_AUTHORS):
        assert table.store_subkey(key, f"{number}", b"%d" % number, now + 60)
    assert not table.store_subkey(key, "one more", b"", now + 60)
    assert not table.store_subkey(key, "7", b"older", now + 59)
    assert table.store_subkey(key, "7", b"newer", now + 61)
    ((_, stored),) = table.items()
    assert stored.expiration_time == now + 61
    assert dict(stored.value.items())["7"].value == b"newer"
