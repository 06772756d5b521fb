"""What proves that a record is final: real keys, and everything a forger might try with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from psyche.network.identity import Identity, open_envelope
from psyche.protocol import envelope as envelopes
from psyche.protocol.certificates import BadCertificate, check_certificate
from psyche.protocol.messages import Accepted, Body, Certificate, Commitment, Excluded, Member, Plan, Proposal, Record
from psyche.protocol.messages import Vote as Ballot
from tests.protocol.players import GENESIS, RUN_ID, contribution

COORDINATOR, STRANGER, *MEMBERS = (Identity(bytes([n]) * 32, Path("unused")) for n in range(1, 7))
MEMBERS.sort(key=lambda identity: identity.peer_id)
NAMES = tuple(member.peer_id for member in MEMBERS)
PLAN = Plan(1, 1, RUN_ID, GENESIS, b"s" * 32, 0, 0, tuple(Member(name, 5, 1) for name in NAMES))
RECORD = Record(
    plan=PLAN,
    accepted=tuple(Accepted(name, contribution(name, PLAN)) for name in NAMES[:3]),
    excluded=(Excluded(NAMES[3], "no commitment before the deadline"),),
    electorate=NAMES,
    reconfiguration=False,
    ring=(),
    results=(),
    minority=(),
)
TERM = 2


def sealed(author: Identity, body: Body, *, run_id: bytes = RUN_ID, round: int = 1, domain: str | None = None) -> bytes:
    return envelopes.encode(author.seal(domain or body.DOMAIN, run_id, round, body.encode()))


def ballot(author: Identity, record: Record = RECORD, *, term: int = TERM, run_id: bytes = RUN_ID) -> bytes:
    return sealed(author, Ballot(term, record.hash), run_id=run_id)


def certificate(
    votes: Sequence[bytes] | None = None, record: Record = RECORD, proposer: Identity = COORDINATOR
) -> Certificate:
    proposal = sealed(proposer, Proposal(TERM, record))
    return Certificate(proposal, tuple([ballot(m, record) for m in MEMBERS[:3]] if votes is None else votes))


def check(given: Certificate, run_id: bytes = RUN_ID) -> Record:
    return check_certificate(given, run_id=run_id, coordinators=(COORDINATOR.peer_id,), open_envelope=open_envelope)


def test_a_quorum_of_real_signatures_proves_the_record() -> None:
    assert check(certificate()) == RECORD
    assert check(certificate([ballot(member) for member in MEMBERS])) == RECORD


def test_a_certificate_survives_the_wire() -> None:
    given = certificate()
    assert msgspec.msgpack.decode(given.encode(), type=Certificate) == given


def with_broken_signature(item: bytes) -> bytes:
    envelope = envelopes.decode(item)
    signature = bytes([envelope.signature[0] ^ 1]) + envelope.signature[1:]
    return envelopes.encode(msgspec.structs.replace(envelope, signature=signature))


def in_the_name_of(item: bytes, name: str) -> bytes:
    return envelopes.encode(msgspec.structs.replace(envelopes.decode(item), author=name))


TWO = [ballot(member) for member in MEMBERS[:2]]
FORGERIES: dict[str, tuple[str, list[bytes]]] = {
    "no votes": ("0 votes", []),
    "two of four": ("2 votes are not more than two thirds of 4", TWO),
    "one vote three times": ("2 votes", [*TWO, TWO[0], TWO[0]]),
    "a stranger's vote": ("2 votes", [*TWO, ballot(STRANGER)]),
    "the coordinator's own vote": ("2 votes", [*TWO, ballot(COORDINATOR)]),
    "a broken signature": ("cannot be believed", [*TWO, with_broken_signature(ballot(MEMBERS[2]))]),
    "in another's name": ("cannot be believed", [*TWO, in_the_name_of(TWO[0], NAMES[2])]),
    "of another run": ("cannot be believed", [*TWO, ballot(MEMBERS[2], run_id=b"q" * 32)]),
    "of another round": ("cannot be believed", [*TWO, sealed(MEMBERS[2], Ballot(TERM, RECORD.hash), round=2)]),
    "of another domain": ("cannot be believed", [*TWO, sealed(MEMBERS[2], Commitment(b"c" * 32, 3))]),
    "a commitment passed off as a vote": (
        "not a vote message",
        [*TWO, sealed(MEMBERS[2], Commitment(b"c" * 32, 3), domain="vote")],
    ),
    "of another term": ("something else", [*TWO, ballot(MEMBERS[2], term=TERM + 1)]),
    "for another record": ("something else", [*TWO, sealed(MEMBERS[2], Ballot(TERM, b"o" * 32))]),
    "not an envelope": ("not an envelope", [*TWO, b"vote"]),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_votes_prove_nothing(name: str) -> None:
    reason, votes = FORGERIES[name]
    with pytest.raises(BadCertificate, match=reason):
        check(certificate(votes))


def test_only_a_coordinator_proposes() -> None:
    for proposer in (STRANGER, MEMBERS[0]):
        with pytest.raises(BadCertificate, match="no coordinator"):
            check(certificate(proposer=proposer))


def test_a_proposal_must_be_signed_for_this_run_and_round() -> None:
    votes = certificate().votes
    body = Proposal(TERM, RECORD)
    for proposal in (
        sealed(COORDINATOR, body, run_id=b"q" * 32),
        sealed(COORDINATOR, body, round=2),
        with_broken_signature(sealed(COORDINATOR, body)),
        in_the_name_of(sealed(STRANGER, body), COORDINATOR.peer_id),
        sealed(COORDINATOR, body, domain="board"),
        sealed(COORDINATOR, Commitment(b"c" * 32, 3), domain="proposal"),
        b"",
    ):
        with pytest.raises(BadCertificate):
            check(Certificate(proposal, votes))


def test_another_runs_certificate_proves_nothing() -> None:
    with pytest.raises(BadCertificate):
        check(certificate(), run_id=b"q" * 32)


@pytest.mark.parametrize(
    ("electorate", "reconfiguration"),
    [
        (NAMES[:3], False),
        (NAMES, True),
        ((*NAMES[:3], STRANGER.peer_id), True),
        ((STRANGER.peer_id,), True),
    ],
)
def test_an_electorate_that_is_not_the_rounds(electorate: tuple[str, ...], reconfiguration: bool) -> None:
    record = msgspec.structs.replace(RECORD, electorate=electorate, reconfiguration=reconfiguration)
    with pytest.raises(BadCertificate, match="electorate"):
        check(certificate(record=record))


def test_survivors_of_a_reconfiguration_are_enough() -> None:
    record = msgspec.structs.replace(RECORD, electorate=NAMES[:2], reconfiguration=True)
    assert check(certificate([ballot(m, record) for m in MEMBERS[:2]], record)) == record
    with pytest.raises(BadCertificate, match="1 votes are not more than two thirds of 2"):
        check(certificate([ballot(m, record) for m in MEMBERS[1:]], record))


def test_an_empty_electorate_elects_nobody() -> None:
    record = msgspec.structs.replace(RECORD, electorate=(), reconfiguration=True)
    with pytest.raises(BadCertificate):
        check(certificate([ballot(m, record) for m in MEMBERS], record))


def test_votes_weigh_what_the_plan_says() -> None:
    weights = (10, 1, 1, 0)
    plan = msgspec.structs.replace(PLAN, members=tuple(Member(n, 5, w) for n, w in zip(NAMES, weights, strict=True)))
    record = msgspec.structs.replace(RECORD, plan=plan)
    assert check(certificate([ballot(MEMBERS[0], record)], record)) == record
    with pytest.raises(BadCertificate, match="3 votes"):
        check(certificate([ballot(m, record) for m in MEMBERS[1:]], record))
