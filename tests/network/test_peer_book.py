"""The peer book remembers a bounded number of peers, enough to rejoin; any member can invite."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from psyche.errors import PsycheError
from psyche.network.address import MAX_ADDRESSES, split_address
from psyche.network.discovery import MAX_ANNOUNCED, decode_addresses, encode_addresses
from psyche.network.identity import Identity
from psyche.network.invite import Invite, invite_from, only_run_directory
from psyche.network.peer_book import ANNOUNCED, DIALLED, MAX_PEERS, PEERS, PeerBook
from psyche.network.records import MAX_BODY
from psyche.telemetry.events import RoundCertified, RunFinished, RunStarted
from tests.processes.swarm import Swarm, swarm
from tests.tiny import certified_roots, write_config

FOREVER = {"total": 500, "inner_steps": 40, "start_members": 1}


def peer(directory: Path, number: int) -> str:
    return Identity.load_or_create(directory / f"{number}.key").peer_id


def at(peer_id: str, port: int, host: str = "203.0.113.7") -> str:
    return f"/ip4/{host}/tcp/{port}/p2p/{peer_id}"


class TestTheBook:
    def test_a_saved_book_is_read_back(self, tmp_path: Path) -> None:
        one, two = peer(tmp_path, 1), peer(tmp_path, 2)
        book = PeerBook(tmp_path / PEERS)
        book.own = (at(one, 1),)
        book.update({two: []}, {two: (at(two, 1), at(two, 2))}, ())
        book.save()
        again = PeerBook(tmp_path / PEERS)
        assert (again.own, again.peers) == (book.own, book.peers)
        assert again.addresses() == [at(two, 1), at(two, 2)]

    def test_only_connected_peers_are_remembered(self, tmp_path: Path) -> None:
        one, two = peer(tmp_path, 1), peer(tmp_path, 2)
        book = PeerBook(tmp_path / PEERS)
        book.update({one: []}, {two: (at(two, 1),)}, (at(two, 3),))
        assert not book.peers

    def test_the_working_address_comes_first_and_the_invites_address_is_kept(self, tmp_path: Path) -> None:
        one = peer(tmp_path, 1)
        private = tuple(at(one, port, "10.0.0.9") for port in range(1, 9))
        public = at(one, 4001)
        book = PeerBook(tmp_path / PEERS)
        book.update({one: ["/ip4/203.0.113.7/tcp/4001"]}, {one: private}, (public,))
        assert book.addresses()[0] == public
        for _ in range(3):
            book.update({one: []}, {one: private}, ())
        assert public in book.addresses()
        assert len(book.addresses()) <= ANNOUNCED + DIALLED

    def test_new_peers_do_not_push_out_connected_ones(self, tmp_path: Path) -> None:
        peers = [peer(tmp_path, number) for number in range(MAX_PEERS + 8)]
        where = {peer_id: (at(peer_id, 1),) for peer_id in peers}
        book = PeerBook(tmp_path / PEERS)
        first, crowd = peers[:2], peers[2:]
        book.update(dict.fromkeys(first, ()), where, ())
        book.update(dict.fromkeys([*crowd, *first], ()), where, ())
        assert len(book.peers) == MAX_PEERS
        assert set(first) <= set(book.peers)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"own": 1, "peers": {}}', b"\xff" * 100, b"[" * 100_000])
    def test_a_damaged_file_is_treated_as_empty(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / PEERS).write_bytes(content)
        assert not PeerBook(tmp_path / PEERS).peers

    def test_invalid_entries_are_skipped(self, tmp_path: Path) -> None:
        one, two = peer(tmp_path, 1), peer(tmp_path, 2)
        entry = {"first_seen": 1.0, "last_seen": 2.0}
        peers = {
            one: {"addresses": ["garbage", at(two, 1), at(one, 1)], **entry},
            two: {"addresses": [at(one, 2)], **entry},
            "x": {"addresses": [], **entry},
        }
        (tmp_path / PEERS).write_text(json.dumps({"own": ["garbage"], "peers": peers}))
        book = PeerBook(tmp_path / PEERS)
        assert book.addresses() == [at(one, 1)]
        assert book.own == ()


class TestAnnouncements:
    def test_addresses_round_trip(self, tmp_path: Path) -> None:
        one = peer(tmp_path, 1)
        addresses = [at(one, port) for port in range(1, 5)]
        assert decode_addresses(one, encode_addresses(addresses)) == tuple(addresses)

    def test_many_long_addresses_fit_into_an_announcement(self, tmp_path: Path) -> None:
        one, two = peer(tmp_path, 1), peer(tmp_path, 2)
        long = [f"/dns4/{'a' * 60}.{number}.example/tcp/1/p2p/{two}/p2p-circuit/p2p/{one}" for number in range(20)]
        body = encode_addresses(long)
        assert len(body) <= MAX_BODY
        assert 0 < len(decode_addresses(one, body)) <= MAX_ANNOUNCED

    @pytest.mark.parametrize("body", [b"", b"\x91", b"\xc1", b"\x01", b"\x91\x01", b"\x91\xa3abc"])
    def test_invalid_bytes_decode_to_no_addresses(self, tmp_path: Path, body: bytes) -> None:
        assert decode_addresses(peer(tmp_path, 1), body) == ()


class TestInviting:
    def test_a_directory_without_a_run_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(PsycheError, match="there is no run in"):
            invite_from(tmp_path)
        with pytest.raises(PsycheError, match="no run was joined"):
            only_run_directory(tmp_path)


@pytest.mark.slow
def test_a_run_continues_after_its_first_bootstrap_node_is_gone(tmp_path: Path) -> None:
    """One node joins through it and rejoins without it; another joins through a member, by that member's invite."""
    config = write_config(tmp_path, members=1, rounds=FOREVER)
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        run.wait("coordinator", RunStarted)
        run.node("keeper")  # keeps the state while the others join and leave
        run.node("first")
        run.wait("first", RoundCertified)
        wait_for_peers(run.directory / "first")
        old = Invite(
            invite_from(run.directory / "first").run_id,
            tuple(PeerBook(run.directory / "first" / PEERS).own[:1]),
        )
        join(run, "second", old)
        run.wait("second", RoundCertified)
        met = wait_for_peers(run.directory / "second", 2)
        assert split_address(old.addresses[0])[1] in met
        for name in ("first", "second"):
            run.kill(name, signal.SIGTERM)

        known = max(event.round for event in run.events("second", RoundCertified))
        join(run, "second", old)  # none of its addresses answers any more
        run.wait("second", RoundCertified, lambda event: event.round > known)

        invited = subprocess.run(
            [sys.executable, "-m", "psyche", "invite", str(run.directory / "second")],
            capture_output=True, text=True, check=True, env=os.environ,
        )  # fmt: skip
        new = Invite.parse(invited.stdout)
        assert 1 < len(new.addresses) <= MAX_ADDRESSES
        own = [text for text in new.addresses if text in PeerBook(run.directory / "second" / PEERS).own]
        assert own
        join(run, "third", Invite(new.run_id, (*old.addresses, *own)))  # the first address is dead
        run.wait("third", RoundCertified)
        assert not run.events("coordinator", RunFinished)
        roots = certified_roots(run.directory / "coordinator" / "events.jsonl")
        assert set(certified_roots(run.directory / "third" / "events.jsonl")) <= set(roots)


def join(run: Swarm, name: str, invite: Invite) -> None:
    run.start(name, "join", invite.encode(), "--directory", str(run.directory / name), "--config", str(run.config))


def wait_for_peers(directory: Path, count: int = 1) -> set[str]:
    """Return the PeerIDs in a node's book once there are ``count``; the test's timeout ends an endless wait."""
    while len(met := PeerBook(directory / PEERS).peers) < count:
        time.sleep(0.2)
    return set(met)
