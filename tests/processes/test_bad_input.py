"""Bad input ends in one sentence and a non-zero exit code, or in a counted rejection; it never changes state."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from psyche.config import MANIFEST, Manifest
from psyche.data.provision import serve_provisions, sign_manifest
from psyche.network.address import split_address
from psyche.network.discovery import KINDS
from psyche.network.identity import Identity
from psyche.network.invite import Invite
from psyche.network.node import NetworkNode
from psyche.network.transport import Refused, Unreachable, Violation
from psyche.protocol.audit_messages import EMPTY
from psyche.protocol.messages import Attestation, Commitment, Hello, Leave, Vote
from psyche.protocol.wire import Envelope, encode_envelope
from psyche.telemetry.events import (
    Checkpointed,
    Notice,
    Rejected,
    RoundCertified,
    RoundStarted,
    RunFinished,
    RunStarted,
)
from tests.processes.swarm import PATIENCE, swarm
from tests.tiny import certified_roots, write_config

FOREVER = {"total": 500, "inner_steps": 40, "start_members": 1}


def psyche(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", "psyche", *arguments],
        capture_output=True, text=True, timeout=PATIENCE, cwd=cwd, stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one sentence that a failed command printed."""
    assert result.returncode not in (0, None)
    assert "Traceback" not in result.stderr + result.stdout, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("psyche: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


class TestJoining:
    def test_garbage_is_not_an_invite(self) -> None:
        assert "this is not an invite" in error_of(psyche("join", "garbage"))

    def test_a_mistyped_invite_is_rejected(self) -> None:
        good = Invite(bytes(32), ("/ip4/127.0.0.1/tcp/1/p2p/12D3KooWGZcT2tqGoMmSTDp7KqRwJJ63mDHvFBGKt5FTcPTJGdvA",))
        text = good.encode()
        swapped = text[:20] + ("A" if text[20] != "A" else "B") + text[21:]
        assert "cut off or mistyped" in error_of(psyche("join", swapped))

    def test_no_peer_answers_at_the_invites_address(self, tmp_path: Path) -> None:
        peer = Identity.load_or_create(tmp_path / "other.key").peer_id
        invite = Invite(bytes(32), (f"/ip4/127.0.0.1/tcp/9/p2p/{peer}",)).encode()
        words = error_of(psyche("join", invite, "--directory", str(tmp_path / "node")))
        assert "/ip4/127.0.0.1/tcp/9" in words
        assert "invite" in words

    @pytest.mark.slow
    def test_a_manifest_with_another_hash_is_rejected(self, tmp_path: Path) -> None:
        """The host at the invite's address serves the manifest of another run."""
        config = write_config(tmp_path, members=1, rounds=FOREVER)
        with swarm(tmp_path / "run", config) as run:
            run.coordinator()
            run.wait("coordinator", RunStarted)
            manifest = Manifest.decode((run.directory / "coordinator" / MANIFEST).read_bytes())
            assert "not that of the invite" in asyncio.run(_join_impostor(tmp_path, manifest))

    def test_a_port_in_use_is_named(self, tmp_path: Path) -> None:
        config = write_config(tmp_path, members=1)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            words = error_of(psyche("coordinator", str(config), "--port", port, "--directory", str(tmp_path / "c")))
        assert f"port {port} is in use" in words
        assert "--port" in words


class TestDisks:
    @pytest.mark.slow  # the check itself is tested with the doctor
    def test_too_little_disk_for_checkpoints_is_reported_before_training(
        self, tmp_path: Path, small_disk: Path
    ) -> None:
        config = write_config(tmp_path, members=1, rounds=FOREVER)
        with swarm(tmp_path / "run", config) as run:
            run.coordinator()
            (run.directory / "node-1").symlink_to(small_disk)
            run.node("node-1")
            assert run.join("node-1") == 1
            words = " ".join(run.output("node-1").split())
            assert re.search(r"psyche: disk: checkpoints.* free .* needed .*--directory", words)
            assert "Traceback" not in words
            assert not run.events("node-1", RoundCertified)

    @pytest.mark.slow
    def test_a_disk_that_fills_up_during_the_run_is_reported(self, tmp_path: Path, large_disk: Path) -> None:
        config = write_config(tmp_path, members=1, rounds=FOREVER)
        with swarm(tmp_path / "run", config) as run:
            run.coordinator()
            (run.directory / "node-1").symlink_to(large_disk)
            run.node("node-1")
            run.wait("node-1", RoundStarted)
            leave_room(large_disk, 1 << 20)
            assert run.join("node-1") == 1
            assert re.search(r"psyche: cannot write a checkpoint to .*free some space", run.output("node-1"))
            assert "Traceback" not in run.output("node-1")

    def test_too_little_disk_for_the_token_store_is_reported(self, tmp_path: Path, small_disk: Path) -> None:
        config = write_config(tmp_path, members=1)
        (small_disk / "filler").write_bytes(bytes(900_000))
        config.write_text(config.read_text().replace(str(tmp_path / "cache"), str(small_disk)))
        words = error_of(psyche("coordinator", str(config), "--directory", str(tmp_path / "c")))
        assert "no space left" in words

    @pytest.mark.slow
    def test_a_corrupt_shard_without_a_good_copy_is_reported(self, tmp_path: Path) -> None:
        config = write_config(tmp_path, members=1, rounds=FOREVER)
        with swarm(tmp_path / "run", config) as run:
            run.coordinator()
            run.wait("coordinator", RunStarted)
            (shard,) = (tmp_path / "cache" / "data").glob("*/train-00000.bin")
            content = bytearray(shard.read_bytes())
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)
            run.node("node-1")
            run.wait("node-1", Notice, lambda event: "train-00000.bin is corrupt, so" in event.text)
            run.wait("node-1", Notice, lambda event: "takes no part in round 1" in event.text)
            assert not run.events("node-1", RoundCertified)

    @pytest.mark.slow
    def test_a_corrupt_checkpoint_is_named_and_skipped(self, tmp_path: Path) -> None:
        config = write_config(tmp_path, members=2, rounds=FOREVER | {"start_members": 2})
        with swarm(tmp_path / "run", config) as run:
            run.coordinator()
            run.node("node-1")
            run.node("node-2")
            run.wait("node-1", Checkpointed, lambda event: event.round == 4)
            run.kill("node-1")
            newest = max((run.directory / "node-1" / "checkpoints").glob("round-*"))
            newest.write_bytes(newest.read_bytes()[:-100])
            known = max(event.round for event in run.events("node-1", RoundCertified))
            run.node("node-1")
            run.wait("node-1", RoundCertified, lambda event: event.round > known)
            assert f"{newest.name} is corrupt" in run.output("node-1")


class TestMessages:
    def test_bad_messages_are_rejected_and_counted_and_change_nothing(self, tmp_path: Path) -> None:
        config = write_config(tmp_path, members=1, rounds=FOREVER | {"total": 3, "inner_steps": 3})
        with swarm(tmp_path / "run", config) as run:
            run.coordinator()
            run.wait("coordinator", RunStarted)
            invite = Invite.parse((run.directory / "coordinator" / "invite").read_text())
            answers = asyncio.run(_send_bad_messages(tmp_path, invite))
            for what, answer in answers.items():
                assert EXPECTED[what] in answer, f"{what}: {answer}"
            run.node("node-1")
            run.wait("coordinator", RunFinished)
            refused = [event.reason for event in run.events("coordinator", Rejected)]
            # the oversized one is rejected by its length, before it is decoded
            assert len(refused) >= len(EXPECTED) - 1
            assert run.join("node-1") == 0
            roots = certified_roots(run.directory / "coordinator" / "events.jsonl")
            assert certified_roots(run.directory / "node-1" / "events.jsonl") == roots
            assert "Traceback" not in run.output("coordinator")


EXPECTED = {
    "noise": "not an envelope",
    "oversized": "over the limit",
    "unknown domain": "not a message that members submit",
    "another run": "expected",
    "wrongly signed": "not signed by",
    "somebody else's": "sent by",
    "malformed body": "not a vote message",
    "another round": "round 7 is not open",
    "a stranger's attestation": "round 1 is not open",
    "a forged history": "not a coordinator of this run",
}


async def _send_bad_messages(directory: Path, invite: Invite) -> dict[str, str]:
    """Return the coordinator's answer to each message."""
    me = Identity.load_or_create(directory / "attacker.key")
    other = Identity.load_or_create(directory / "other.key")
    run = invite.run_id
    vote, attested = Vote(1, bytes(32)).encode(), Attestation(bytes(32), ()).encode()
    forged = me.seal("vote", run, 1, vote)
    history = Hello(5, bytes(32), bytes(32), "CPU", claim=None, certificate=_forged_certificate(me, run))
    messages = {
        "noise": b"\xff" * 100,
        "oversized": bytes((1 << 20) + 1),
        "unknown domain": encode_envelope(me.seal("run-status", run, 1, b"")),
        "another run": encode_envelope(me.seal("commitment", bytes(32), 1, Commitment(bytes(32), 1).encode())),
        "wrongly signed": encode_envelope(Envelope(forged.domain, run, 1, forged.author, forged.body, bytes(64))),
        "somebody else's": encode_envelope(other.seal("leave", run, 1, Leave("bye").encode())),
        "malformed body": encode_envelope(me.seal("vote", run, 1, b"\x93\x01\x02\x03")),
        "another round": encode_envelope(me.seal("commitment", run, 7, Commitment(bytes(32), 1).encode())),
        "a stranger's attestation": encode_envelope(me.seal("attestation", run, 1, attested)),
        "a forged history": encode_envelope(me.seal("hello", run, 5, history.encode())),
    }
    answers = {}
    coordinator = split_address(invite.addresses[0])[1]
    async with await _client(me, invite) as node:
        for what, data in messages.items():
            try:
                await node.rpc.call(coordinator, "submit", data, timeout=10, max_reply=64)
                answers[what] = "accepted"
            except (Refused, Violation, Unreachable) as error:
                answers[what] = str(error)
    return answers


def _forged_certificate(me: Identity, run: bytes) -> object:
    from psyche.protocol.messages import Accepted, Certificate, Contribution, Member, Plan, Proposal, Record

    zero = bytes(32)
    plan = Plan(5, 1, zero, zero, zero, 0, "gather", 0, (Member(me.peer_id, 40, 1),))
    contribution = Contribution(*[zero] * 7, 1, 40, 0, 2560, False, b"", zero)
    alone = (me.peer_id,)
    record = Record(plan, (Accepted(me.peer_id, contribution),), (), 1, alone, (1,), (), EMPTY, (), (), (), ())
    proposal = me.seal("proposal", run, 5, Proposal(2, record, ()).encode())
    vote = me.seal("vote", run, 5, Vote(2, record.hash).encode())
    return Certificate(encode_envelope(proposal), (encode_envelope(vote),), ())


async def _join_impostor(directory: Path, manifest: Manifest) -> str:
    """Return what ``psyche join`` prints if the host serves ``manifest`` under an invite to another run."""
    from psyche.data.provision import local_store

    identity = Identity.load_or_create(directory / "impostor.key")
    invited = bytes(reversed(manifest.run_id))
    host = await NetworkNode.create(identity, run_id=invited, kinds=KINDS, listen=["/ip4/127.0.0.1/tcp/0"])
    async with host:
        store = local_store(manifest, directory / "cache")
        await serve_provisions(host, sign_manifest(manifest, identity), store)
        invite = Invite(invited, tuple(await host.addresses())).encode()
        result = await asyncio.to_thread(psyche, "join", invite, "--directory", str(directory / "victim"))
        return error_of(result)


async def _client(identity: Identity, invite: Invite) -> NetworkNode:
    return await NetworkNode.create(
        identity,
        run_id=invite.run_id,
        kinds=KINDS,
        listen=["/ip4/127.0.0.1/tcp/0"],
        bootstrap=invite.addresses,
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with _disk(tmp_path / "small", "1m") as place:
        yield place


@pytest.fixture
def large_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system large enough for a tiny run."""
    with _disk(tmp_path / "large", "64m") as place:
        yield place


def leave_room(disk: Path, room: int) -> None:
    """Fill a disk except for ``room`` bytes: enough for logs, not for a checkpoint."""
    with (disk / "filler").open("wb", buffering=0) as filler:
        filler.write(bytes(shutil.disk_usage(disk).free - room))


@contextlib.contextmanager
def _disk(place: Path, size: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
