"""What a member votes and a coordinator signs is on its disk before anybody hears of it, and binds it after a crash."""

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


def test_a_member_that_starts_again_remembers_its_vote(tmp_path: Path) -> None:
    asyncio.run(vote(voter(tmp_path), RECORD, 5))
    again = voter(tmp_path)
    with pytest.raises(Refusal, match="two different records in term 5"):
        asyncio.run(vote(again, OTHER, 5))
    with pytest.raises(Refusal, match="term 4 is over"):
        asyncio.run(vote(again, OTHER, 4))
    assert asyncio.run(again.promise(6, b"claim", 0)).accepted == b"proposal", "a new leader hears of it"


def test_a_member_that_starts_again_remembers_its_promise(tmp_path: Path) -> None:
    asyncio.run(voter(tmp_path).promise(9, b"claim", 0))
    again = voter(tmp_path)
    assert (again.term, again.claim) == (9, b"claim")
    with pytest.raises(Refusal, match="term 8 is over"):
        asyncio.run(vote(again, RECORD, 8))


def test_a_vote_that_cannot_be_kept_is_not_given(tmp_path: Path) -> None:
    one = voter(tmp_path / "gone")
    with pytest.raises(PsycheError):
        asyncio.run(vote(one, RECORD, 5))
    (tmp_path / "gone").mkdir()
    asyncio.run(vote(one, OTHER, 5))  # nothing was said


# ------------------------------------------------------------------------------------- coordinators


class Line:
    """Calls between coordinators in one process; who is not on it does not answer."""

    def __init__(self) -> None:
        self.there: dict[str, Cosigner] = {}

    async def call(self, peer: str, name: str, request: bytes, *, timeout: float, max_reply: int) -> bytes:  # noqa: ASYNC109
        if peer not in self.there:
            raise Unreachable(peer, "is away")
        return await self.there[peer]._sign_for(decode_envelope(request).author, request)


def notary(identity: Identity, directory: Path, line: Line | None = None) -> Cosigner:
    directory.mkdir(exist_ok=True)
    resolved = MANIFEST.resolved.model_copy(update={"coordinators": (COORDINATOR.peer_id, STRANGER.peer_id)})
    two = MANIFEST.model_copy(update={"resolved": resolved})
    return Cosigner(two, identity, cast(Rpc, line or Line()), directory)


ROSTER = Reconfiguration(RULES.run_id, 1, NAMES)
SEAL = Seal(RULES.run_id, 0, b"r" * 32)


Hear = Callable[[ConflictingSignature | None], None]


def unhindered(perjury: ConflictingSignature | None) -> None:
    raise AssertionError(perjury)


async def hindered(asking: Callable[[Hear], Coroutine[None, None, tuple[bytes, ...]]]) -> ConflictingSignature | None:
    """What the first attempt is hindered by."""
    heard: asyncio.Queue[ConflictingSignature | None] = asyncio.Queue()
    asked = asyncio.create_task(asking(heard.put_nowait))
    hearing = asyncio.create_task(heard.get())
    await asyncio.wait({asked, hearing}, return_when=asyncio.FIRST_COMPLETED)
    assert not asked.done(), f"it was signed: {asked.result()}"
    asked.cancel()
    return hearing.result()


def test_a_coordinator_that_starts_again_signs_nothing_against_its_word(tmp_path: Path) -> None:
    asyncio.run(notary(COORDINATOR, tmp_path).gather(SEAL, 1, 1, unhindered))
    again = notary(COORDINATOR, tmp_path)
    other = Seal(RULES.run_id, 0, b"o" * 32)
    perjury = asyncio.run(hindered(lambda hear: again.gather(other, 1, 1, hear)))
    assert perjury is not None
    assert perjury.sealed == b"r" * 32


def test_a_coordinator_signs_a_roster_only_where_enough_others_do(tmp_path: Path) -> None:
    """Else it could not seal what the electorate before decides, and nobody could."""
    alone = notary(COORDINATOR, tmp_path)
    assert asyncio.run(hindered(lambda hear: alone.gather(ROSTER, 1, 2, hear))) is None
    assert not (tmp_path / SIGNED_STATE).exists()
    asyncio.run(alone.gather(SEAL, 1, 1, unhindered))


def test_two_coordinators_sign_for_each_other_and_say_why_not(tmp_path: Path) -> None:
    line = Line()
    one, two = notary(COORDINATOR, tmp_path / "one", line), notary(STRANGER, tmp_path / "two", line)
    line.there[STRANGER.peer_id] = two
    authors = [decode_envelope(item).author for item in asyncio.run(one.gather(ROSTER, 1, 2, unhindered))]
    assert sorted(authors) == sorted((COORDINATOR.peer_id, STRANGER.peer_id))
    perjury = asyncio.run(hindered(lambda hear: one.gather(SEAL, 1, 2, hear)))
    assert perjury is not None
    assert perjury.reconfiguration == 1, "the seal is of the electorate before"


@pytest.mark.parametrize("name", [BALLOT, SIGNED_STATE])
def test_a_file_that_was_changed_is_no_reason_to_begin_anew(tmp_path: Path, name: str) -> None:
    asyncio.run(vote(voter(tmp_path), RECORD, 5))
    asyncio.run(notary(COORDINATOR, tmp_path).gather(SEAL, 1, 1, unhindered))
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PsycheError, match="must not contradict"):
        voter(tmp_path) if name == BALLOT else notary(COORDINATOR, tmp_path)
