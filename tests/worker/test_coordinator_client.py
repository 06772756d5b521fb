"""A member's connection to its coordinators: it never waits for one that does not lead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from psyche.config import Manifest, load_config
from psyche.diloco.launch import launch
from psyche.network.identity import Identity
from psyche.network.transport import Refused, Unreachable
from psyche.protocol.messages import Hello, Promise, RunStatus
from psyche.protocol.round_state import Phase
from psyche.protocol.wire import RefusalCode, encode_envelope
from psyche.worker import coordinator_client as module
from psyche.worker.coordinator_client import CoordinatorClient
from tests.tiny import write_config

GUARD_SECONDS = 20.0
Answer = Callable[[str], bytes]


class FakeNetwork:
    """A fake network in which each coordinator answers as configured."""

    def __init__(self, answers: dict[str, Answer]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str]] = []

    async def call(self, peer_id: str, name: str, request: bytes, **_: object) -> bytes:
        self.asked.append((peer_id, name))
        await asyncio.sleep(0)
        return self.answers[peer_id](name)


class NewNode:
    term = 0

    def hello(self) -> Hello:
        return Hello(0, bytes(32), bytes(32), "CPU", None, None)

    async def promise(self, term: int, claim: bytes) -> Promise:
        return Promise(term, 0, None, None, (), ())


@pytest.fixture(scope="module")
def coordinators(tmp_path_factory: pytest.TempPathFactory) -> tuple[Identity, Identity]:
    folder = tmp_path_factory.mktemp("keys")
    return Identity.load_or_create(folder / "a"), Identity.load_or_create(folder / "b")


@pytest.fixture(scope="module")
def manifest(coordinators: tuple[Identity, Identity], tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    first, second = coordinators
    path = write_config(tmp_path_factory.mktemp("run"), members=1, standbys=[second.peer_id])
    return launch(load_config(path), first.peer_id).manifest


def leading(identity: Identity, manifest: Manifest, term: int) -> Answer:
    """Return the answers of a coordinator that leads and accepts every message."""
    status = RunStatus(1, term, b"", Phase.WAITING, 0, bytes(32), None, 0.0, False, (), (), None, None, None, (), "")

    def answer(name: str) -> bytes:
        if name == "submit":
            return b""
        return encode_envelope(identity.seal(RunStatus.DOMAIN, manifest.run_id, 0, status.encode()))

    return answer


def refusing(on: dict[str, RefusalCode]) -> Answer:
    def answer(name: str) -> bytes:
        raise Refused("a sentence", on[name])

    return answer


def silent(name: str) -> bytes:
    raise Unreachable("12D3Koo", "did not answer")


async def followed(client: CoordinatorClient) -> RunStatus:
    """Return the first run status of a leader that the client has promised to follow."""
    watching = asyncio.create_task(client.watch())
    try:
        async with asyncio.timeout(GUARD_SECONDS):
            return await client.until(lambda status: True)
    finally:
        watching.cancel()


@pytest.mark.parametrize(
    "first",
    [
        refusing(
            {"watch": RefusalCode.UNKNOWN_PEER, "submit": RefusalCode.NOT_LEADING}
        ),  # it stood down between the two calls
        refusing({"watch": RefusalCode.NOT_LEADING, "submit": RefusalCode.NOT_LEADING}),
        silent,
    ],
    ids=["stands down", "stands by", "unreachable"],
)
def test_a_client_moves_on_to_the_coordinator_that_leads(
    first: Answer,
    coordinators: tuple[Identity, Identity],
    manifest: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    one, other = coordinators
    network = FakeNetwork({one.peer_id: first, other.peer_id: leading(other, manifest, 3)})
    own = Identity.load_or_create(tmp_path / "own")
    client = CoordinatorClient(manifest, own, network, NewNode(), lambda text: None)  # type: ignore[arg-type]

    assert asyncio.run(followed(client)).term == 3
    assert (other.peer_id, "submit") in network.asked, "the promise was not sent"


def test_a_message_that_a_dying_leader_misses_is_sent_to_the_next(
    coordinators: tuple[Identity, Identity], manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A promise that the leader cannot receive does not block the client."""
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    one, other = coordinators
    status = leading(one, manifest, 2)

    def dying(name: str) -> bytes:
        return status(name) if name == "watch" else silent(name)

    network = FakeNetwork({one.peer_id: dying, other.peer_id: leading(other, manifest, 3)})
    own = Identity.load_or_create(tmp_path / "own")
    client = CoordinatorClient(manifest, own, network, NewNode(), lambda text: None)  # type: ignore[arg-type]

    assert asyncio.run(followed(client)).term == 3
