"""Votes and signatures are persisted before they are sent, and bind their author after a crash."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import cast

import msgspec
import pytest

from psyche.coordinator.cosigner import SIGNED_STATE, Cosigner
from psyche.errors import PsycheError
from psyche.network.identity import Identity
from psyche.network.rpc import Rpc
from psyche.network.transport import Unreachable
from psyche.protocol.acceptor import Chain, Refusal
from psyche.protocol.certificates import ConflictingSignature
from psyche.protocol.messages import Proposal, Reconfiguration, Record, Seal
from psyche.protocol.wire import decode_envelope
from psyche.worker.voter import BALLOT, Reveals, Voter
from tests.chains import COORDINATOR, MANIFEST, NAMES, RULES, STRANGER, chain

RECORD = chain(1)[0].record
OTHER = msgspec.structs.replace(RECORD, excluded=())
START = Chain(0, RULES.run_id, RULES.genesis, 0)

# ------------------------------------------------------------------------------------------ members


def voter(directory: Path) -> Voter:
    return Voter(MANIFEST, RULES, directory, None)


async def vote(one: Voter, record: Record, term: int) -> None:
    reveals = Reveals(RULES.run_id, record.plan)
    reveals.contributions = {accepted.node: accepted.contribution for accepted in record.accepted}
    held = frozenset(reveals.contributions)
    await one.vote(Proposal(term, record, ()), b"proposal", chain=START, reveals=reveals, held=held, reduced={})


def test_a_restarted_member_remembers_its_vote(tmp_path: Path) -> None:
    asyncio.run(vote(voter(tmp_path), RECORD, 5))
    again = voter(tmp_path)
    with pytest.raises(Refusal, match="two different records in term 5"):
        asyncio.run(vote(again, OTHER, 5))
    with pytest.raises(Refusal, match="term 4 is over"):
        asyncio.run(vote(again, OTHER, 4))
    assert asyncio.run(again.promise(6, b"claim", 0)).accepted == b"proposal", "the vote is not in the promise"


def test_a_restarted_member_remembers_its_promise(tmp_path: Path) -> None:
    asyncio.run(voter(tmp_path).promise(9, b"claim", 0))
    again = voter(tmp_path)
    assert (again.term, again.claim) == (9, b"claim")
    with pytest.raises(Refusal, match="term 8 is over"):
        asyncio.run(vote(again, RECORD, 8))


def test_a_vote_that_cannot_be_persisted_is_not_sent(tmp_path: Path) -> None:
    one = voter(tmp_path / "gone")
    with pytest.raises(PsycheError):
        asyncio.run(vote(one, RECORD, 5))
    (tmp_path / "gone").mkdir()
    asyncio.run(vote(one, OTHER, 5))  # the first vote was never sent


# ------------------------------------------------------------------------------------- coordinators


class FakeNetwork:
    """Calls between coordinators in one process; only ``reachable`` ones answer."""

    def __init__(self) -> None:
        self.reachable: dict[str, Cosigner] = {}

    async def call(self, peer: str, name: str, request: bytes, *, timeout: float, max_reply: int) -> bytes:  # noqa: ASYNC109
        if peer not in self.reachable:
            raise Unreachable(peer, "is away")
        return await self.reachable[peer]._sign_for(decode_envelope(request).author, request)


def cosigner(identity: Identity, directory: Path, network: FakeNetwork | None = None) -> Cosigner:
    directory.mkdir(exist_ok=True)
    resolved = MANIFEST.resolved.model_copy(update={"coordinators": (COORDINATOR.peer_id, STRANGER.peer_id)})
    two = MANIFEST.model_copy(update={"resolved": resolved})
    return Cosigner(two, identity, cast(Rpc, network or FakeNetwork()), directory)


RECONFIGURATION = Reconfiguration(RULES.run_id, 1, NAMES)
SEAL = Seal(RULES.run_id, 0, b"r" * 32)


OnConflict = Callable[[ConflictingSignature | None], None]


def no_conflict(conflict: ConflictingSignature | None) -> None:
    raise AssertionError(conflict)


async def first_conflict(
    asking: Callable[[OnConflict], Coroutine[None, None, tuple[bytes, ...]]],
) -> ConflictingSignature | None:
    """Return the conflict that prevents the first attempt, or None if too few coordinators answer."""
    conflicts: asyncio.Queue[ConflictingSignature | None] = asyncio.Queue()
    asked = asyncio.create_task(asking(conflicts.put_nowait))
    hearing = asyncio.create_task(conflicts.get())
    await asyncio.wait({asked, hearing}, return_when=asyncio.FIRST_COMPLETED)
    assert not asked.done(), f"it was signed: {asked.result()}"
    asked.cancel()
    return hearing.result()


def test_a_restarted_coordinator_signs_nothing_that_contradicts_its_signatures(tmp_path: Path) -> None:
    asyncio.run(cosigner(COORDINATOR, tmp_path).gather(SEAL, 1, 1, no_conflict))
    again = cosigner(COORDINATOR, tmp_path)
    other = Seal(RULES.run_id, 0, b"o" * 32)
    conflict = asyncio.run(first_conflict(lambda on_conflict: again.gather(other, 1, 1, on_conflict)))
    assert conflict is not None
    assert conflict.sealed == b"r" * 32


def test_a_coordinator_signs_a_reconfiguration_only_if_enough_others_can(tmp_path: Path) -> None:
    """Otherwise it could not seal what the previous electorate decides, and nobody could."""
    alone = cosigner(COORDINATOR, tmp_path)
    assert asyncio.run(first_conflict(lambda on_conflict: alone.gather(RECONFIGURATION, 1, 2, on_conflict))) is None
    assert not (tmp_path / SIGNED_STATE).exists()
    asyncio.run(alone.gather(SEAL, 1, 1, no_conflict))


def test_two_coordinators_sign_for_each_other_or_report_the_conflict(tmp_path: Path) -> None:
    network = FakeNetwork()
    one, two = cosigner(COORDINATOR, tmp_path / "one", network), cosigner(STRANGER, tmp_path / "two", network)
    network.reachable[STRANGER.peer_id] = two
    authors = [decode_envelope(item).author for item in asyncio.run(one.gather(RECONFIGURATION, 1, 2, no_conflict))]
    assert sorted(authors) == sorted((COORDINATOR.peer_id, STRANGER.peer_id))
    conflict = asyncio.run(first_conflict(lambda on_conflict: one.gather(SEAL, 1, 2, on_conflict)))
    assert conflict is not None
    assert conflict.reconfiguration == 1, "the seal is of the previous electorate"


@pytest.mark.parametrize("name", [BALLOT, SIGNED_STATE])
def test_a_corrupt_signing_record_is_refused_rather_than_reset(tmp_path: Path, name: str) -> None:
    asyncio.run(vote(voter(tmp_path), RECORD, 5))
    asyncio.run(cosigner(COORDINATOR, tmp_path).gather(SEAL, 1, 1, no_conflict))
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PsycheError, match="must not contradict"):
        voter(tmp_path) if name == BALLOT else cosigner(COORDINATOR, tmp_path)
