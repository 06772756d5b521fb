"""Certificates that prove a record is final, with real keys, and forgeries that do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from psyche.network.identity import Identity, open_envelope
from psyche.protocol.audit_messages import EMPTY
from psyche.protocol.certificates import (
    BadCertificate,
    attests_state,
    check_certificate,
    seals_needed,
    signatures_needed,
)
from psyche.protocol.messages import (
    Accepted,
    Attestation,
    Certificate,
    Commitment,
    Excluded,
    ExclusionReason,
    Hello,
    Member,
    Plan,
    Proposal,
    Reconfiguration,
    Record,
    Seal,
)
from psyche.protocol.messages import Vote as Ballot
from psyche.protocol.wire import Body, decode_envelope, encode_envelope
from tests.protocol.one_leader import GENESIS, RUN_ID, contribution, with_electorate

COORDINATOR, STRANGER, *MEMBERS = (Identity(bytes([n]) * 32, Path("unused")) for n in range(1, 7))
MEMBERS.sort(key=lambda identity: identity.peer_id)
NAMES = tuple(member.peer_id for member in MEMBERS)
PLAN = Plan(1, 1, RUN_ID, GENESIS, b"s" * 32, 0, "gather", 0, tuple(Member(name, 5, 1) for name in NAMES))
RECORD = Record(
    plan=PLAN,
    accepted=tuple(Accepted(name, contribution(name, PLAN)) for name in NAMES[:3]),
    excluded=(Excluded(NAMES[3], ExclusionReason.NO_COMMITMENT),),
    reconfiguration=0,
    electorate=NAMES,
    voting_weights=(4, 3, 2, 2),
    standing=(),
    audit_state=EMPTY,
    commitments=(),
    reducer_order=(),
    results=(),
    dissenters=(),
)
TERM = 2


def signed_message(
    author: Identity, body: Body, *, run_id: bytes = RUN_ID, round_number: int = 1, domain: str | None = None
) -> bytes:
    return encode_envelope(author.seal(domain or body.DOMAIN, run_id, round_number, body.encode()))


def ballot(author: Identity, record: Record = RECORD, *, term: int = TERM, run_id: bytes = RUN_ID) -> bytes:
    return signed_message(author, Ballot(term, record.hash), run_id=run_id)


def seal_by(author: Identity, record: Record = RECORD) -> bytes:
    return signed_message(author, Seal(record.plan.previous, record.reconfiguration, record.hash))


def reconfiguration_by(author: Identity, record: Record) -> bytes:
    return signed_message(author, Reconfiguration(record.plan.previous, record.reconfiguration, record.electorate))


def certificate(
    votes: Sequence[bytes] | None = None, record: Record = RECORD, proposer: Identity = COORDINATOR
) -> Certificate:
    reconfiguration = (reconfiguration_by(COORDINATOR, record),) if record.reconfiguration else ()
    proposal = signed_message(proposer, Proposal(TERM, record, reconfiguration))
    cast = [ballot(m, record) for m in MEMBERS[:3]] if votes is None else votes
    return Certificate(proposal, tuple(cast), (seal_by(COORDINATOR, record),))


def check(given: Certificate, run_id: bytes = RUN_ID) -> Record:
    return check_certificate(given, run_id=run_id, coordinators=(COORDINATOR.peer_id,), open_envelope=open_envelope)


def test_a_quorum_of_real_signatures_proves_the_record() -> None:
    assert check(certificate()) == RECORD
    assert check(certificate([ballot(member) for member in MEMBERS])) == RECORD


def test_a_certificate_round_trips_through_its_encoding() -> None:
    given = certificate()
    assert msgspec.msgpack.decode(given.encode(), type=Certificate) == given


def with_broken_signature(item: bytes) -> bytes:
    envelope = decode_envelope(item)
    signature = bytes([envelope.signature[0] ^ 1]) + envelope.signature[1:]
    return encode_envelope(msgspec.structs.replace(envelope, signature=signature))


def with_author(item: bytes, name: str) -> bytes:
    return encode_envelope(msgspec.structs.replace(decode_envelope(item), author=name))


TWO = [ballot(member) for member in MEMBERS[:2]]
FORGERIES: dict[str, tuple[str, list[bytes]]] = {
    "no votes": ("0 votes", []),
    "two of four": ("2 votes have 63", TWO),
    "one vote three times": ("2 votes have 63", [*TWO, TWO[0], TWO[0]]),
    "a stranger's vote": ("3 votes have 63", [*TWO, ballot(STRANGER)]),
    "the coordinator's own vote": ("3 votes have 63", [*TWO, ballot(COORDINATOR)]),
    "a broken signature": ("is invalid", [*TWO, with_broken_signature(ballot(MEMBERS[2]))]),
    "in another's name": ("is invalid", [*TWO, with_author(TWO[0], NAMES[2])]),
    "of another run": ("is invalid", [*TWO, ballot(MEMBERS[2], run_id=b"q" * 32)]),
    "of another round": ("is invalid", [*TWO, signed_message(MEMBERS[2], Ballot(TERM, RECORD.hash), round_number=2)]),
    "of another domain": ("is invalid", [*TWO, signed_message(MEMBERS[2], Commitment(b"c" * 32, 3))]),
    "a commitment passed off as a vote": (
        "not a vote message",
        [*TWO, signed_message(MEMBERS[2], Commitment(b"c" * 32, 3), domain="vote")],
    ),
    "of another term": ("something else", [*TWO, ballot(MEMBERS[2], term=TERM + 1)]),
    "for another record": ("something else", [*TWO, signed_message(MEMBERS[2], Ballot(TERM, b"o" * 32))]),
    "not an envelope": ("not an envelope", [*TWO, b"vote"]),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_votes_prove_nothing(name: str) -> None:
    reason, votes = FORGERIES[name]
    with pytest.raises(BadCertificate, match=reason):
        check(certificate(votes))


def test_only_a_coordinator_proposes() -> None:
    for proposer in (STRANGER, MEMBERS[0]):
        with pytest.raises(BadCertificate, match="not a coordinator"):
            check(certificate(proposer=proposer))


def test_a_proposal_must_be_signed_for_this_run_and_round() -> None:
    votes = certificate().votes
    body = Proposal(TERM, RECORD, ())
    for proposal in (
        signed_message(COORDINATOR, body, run_id=b"q" * 32),
        signed_message(COORDINATOR, body, round_number=2),
        with_broken_signature(signed_message(COORDINATOR, body)),
        with_author(signed_message(STRANGER, body), COORDINATOR.peer_id),
        signed_message(COORDINATOR, body, domain="run-status"),
        signed_message(COORDINATOR, Commitment(b"c" * 32, 3), domain="proposal"),
        b"",
    ):
        with pytest.raises(BadCertificate):
            check(Certificate(proposal, votes, certificate().seals))


def test_another_runs_certificate_proves_nothing() -> None:
    with pytest.raises(BadCertificate):
        check(certificate(), run_id=b"q" * 32)


def test_survivors_of_a_reconfiguration_are_enough() -> None:
    record = with_electorate(RECORD, NAMES[:2], reconfiguration=1)
    assert check(certificate([ballot(m, record) for m in MEMBERS[:2]], record)) == record
    with pytest.raises(BadCertificate, match="3 votes have 42"):
        check(certificate([ballot(m, record) for m in MEMBERS[1:]], record))


# ------------------------------------------------------------------------------ proof of a state


def attested(author: Identity, root: bytes = b"s" * 32, round_number: int = 7, run_id: bytes = RUN_ID) -> bytes:
    body = Attestation(root, ())
    return encode_envelope(author.seal(body.DOMAIN, run_id, round_number, body.encode()))


def introduced(author: Identity, root: bytes = b"s" * 32) -> bytes:
    body = Hello(7, b"h" * 32, root, "", None, None)
    return encode_envelope(author.seal(body.DOMAIN, RUN_ID, 7, body.encode()))


WEIGHTS = dict(zip(NAMES, (4, 3, 2, 2), strict=True))
FIRST, SECOND, THIRD, FOURTH = MEMBERS


def proves(*items: bytes) -> bool:
    return attests_state(
        items, round_number=7, state_root=b"s" * 32, weights=WEIGHTS, run_id=RUN_ID, open_envelope=open_envelope
    )


def test_more_than_half_of_the_weight_proves_a_state() -> None:
    assert proves(attested(FIRST), attested(THIRD))
    assert proves(attested(FIRST), introduced(SECOND))
    assert not proves(attested(SECOND), attested(THIRD))
    assert not proves()


@pytest.mark.parametrize(
    "other",
    [
        attested(FIRST),
        attested(SECOND, b"x" * 32),
        attested(SECOND, round_number=8),
        attested(SECOND, run_id=b"q" * 32),
        attested(COORDINATOR),
        attested(STRANGER),
        ballot(SECOND),
        attested(SECOND)[:-1] + b"x",
        b"noise",
        b"",
    ],
)
def test_other_messages_do_not_attest_a_state(other: bytes) -> None:
    """Before this check a coordinator could replace every node's weights with one signature of its own."""
    assert not proves(attested(FIRST), other)


# ------------------------------------------------------------------------------ several coordinators

THREE = [COORDINATOR, STRANGER, Identity(bytes([77]) * 32, Path("unused"))]
KEYS = tuple(one.peer_id for one in THREE)


def check_three(given: Certificate) -> Record:
    return check_certificate(given, run_id=RUN_ID, coordinators=KEYS, open_envelope=open_envelope)


def of_three(
    signers: Sequence[Identity], sealers: Sequence[Identity], *, reconfiguration: int = 0, term: int = 3
) -> Certificate:
    record = msgspec.structs.replace(RECORD, reconfiguration=reconfiguration)
    signed = tuple(reconfiguration_by(one, record) for one in signers)
    proposal = signed_message(THREE[term % 3], Proposal(term, record, signed))
    votes = tuple(ballot(member, record, term=term) for member in MEMBERS[:3])
    return Certificate(proposal, votes, tuple(seal_by(one, record) for one in sealers))


def test_every_reconfiguration_and_every_certificate_share_a_coordinator() -> None:
    for count in range(1, 17):
        assert signatures_needed(count) + seals_needed(count) > count
        assert seals_needed(count) <= signatures_needed(count)
    assert [seals_needed(count) for count in (1, 2, 3)] == [1, 1, 2]


def test_two_of_three_coordinators_can_seal_and_sign_a_reconfiguration() -> None:
    for seals in (THREE[:2], THREE[1:], THREE):
        assert check_three(of_three((), seals)).reconfiguration == 0
        assert check_three(of_three(seals, seals, reconfiguration=1)).reconfiguration == 1


@pytest.mark.parametrize(
    ("reason", "given"),
    [
        ("1 of 3 coordinators sealed it; 2 needed", of_three((), THREE[:1])),
        ("1 of 3 coordinators sealed it", of_three((), [THREE[0], THREE[0]])),
        ("which is not a coordinator", of_three((), [*THREE[:2], MEMBERS[0]])),
        ("1 of 3 coordinators signed the reconfiguration", of_three(THREE[:1], THREE, reconfiguration=1)),
        ("0 of 3 coordinators signed the reconfiguration", of_three((), THREE, reconfiguration=1)),
        ("term 3 does not belong to", msgspec.structs.replace(
            of_three((), THREE), proposal=signed_message(THREE[1], Proposal(3, RECORD, ()))
        )),
        ("signed another seal", msgspec.structs.replace(
            of_three((), THREE), seals=tuple(signed_message(one, Seal(RUN_ID, 0, b"o" * 32)) for one in THREE)
        )),
    ],
)  # fmt: skip
def test_coordinators_signatures_are_counted_and_checked(reason: str, given: Certificate) -> None:
    with pytest.raises(BadCertificate, match=reason):
        check_three(given)
