"""What a chain of certificates proves, and how tampering with one is detected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.protocol.chain import BadLedger, Entry, claimed, missing_rounds
from psyche.protocol.messages import Accepted, Certificate, Excluded, ExclusionReason, Record
from psyche.protocol.wire import decode, decode_envelope, encode_envelope
from tests.chains import NAMES, RULES, STRANGER, Link, certify, chain, link, verified, with_plan
from tests.protocol.one_leader import with_electorate

CHAIN = chain(6)
ENTRIES = [one.entry for one in CHAIN]


def test_a_valid_chain_is_verified_round_by_round() -> None:
    found = verified(ENTRIES)
    assert [one.record for one in found] == [one.record for one in CHAIN]
    assert not any(one.missing for one in found)
    each = RULES.inner_steps * RULES.tokens_per_step
    assert found[1].tokens == dict.fromkeys(NAMES, each)
    assert found[2].tokens == dict.fromkeys(NAMES[:-1], each), "the last was left out"


def test_an_empty_chain_is_valid() -> None:
    assert verified([]) == []


def test_state_roots_may_be_unknown() -> None:
    assert len(verified([replace(one, state_root=None) for one in ENTRIES])) == 6


@given(st.sets(st.integers(1, 6), min_size=1))
@settings(deadline=None)
def test_present_rounds_are_verified_and_missing_ones_are_named(there: set[int]) -> None:
    found = verified([one for one in ENTRIES if one.round in there])
    assert [one.record.plan.round for one in found] == sorted(there)
    missing = [round_number for one in found for round_number in one.missing]
    assert missing == [round_number for round_number in range(1, max(there)) if round_number not in there]
    assert [round_number for gap in missing_rounds(sorted(there)) for round_number in gap] == missing


def fault(entries: list[Entry]) -> BadLedger:
    with pytest.raises(BadLedger) as caught:
        verified(entries)
    return caught.value


@given(st.permutations(range(6)).filter(lambda order: list(order) != sorted(order)))
@settings(deadline=None, max_examples=30)
def test_rounds_out_of_order_are_rejected(order: list[int]) -> None:
    first = next(at for at in range(1, 6) if order[at] < order[at - 1])
    found = fault([ENTRIES[at] for at in order])
    assert found.round == ENTRIES[order[first]].round
    assert f"it follows round {order[first - 1] + 1} " in found.reason


@given(st.integers(0, 5), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_a_certificate_of_another_round_is_rejected(at: int, of: int) -> None:
    if at == of:
        return
    found = fault([*ENTRIES[:at], replace(ENTRIES[at], certificate=ENTRIES[of].certificate), *ENTRIES[at + 1 :]])
    assert found.round == at + 1
    assert f"its certificate is of round {of + 1}" in found.reason


@given(st.integers(0, 5), st.data())
@settings(deadline=None, max_examples=60)
def test_a_changed_byte_anywhere_in_a_certificate_is_detected(at: int, data: st.DataObject) -> None:
    content = bytearray(ENTRIES[at].certificate)
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    assert fault([*ENTRIES[:at], replace(ENTRIES[at], certificate=bytes(content)), *ENTRIES[at + 1 :]]).round == at + 1


@given(st.integers(0, 4), st.binary(min_size=32, max_size=32))
@settings(deadline=None, max_examples=20)
def test_another_state_root_is_contradicted_by_the_next_round(at: int, root: bytes) -> None:
    found = fault([*ENTRIES[:at], replace(ENTRIES[at], state_root=root), *ENTRIES[at + 1 :]])
    assert (found.round, "another state" in found.reason) == (at + 2, True)


def test_a_vote_under_another_members_name_is_rejected() -> None:
    certificate = decode(Certificate, CHAIN[2].certificate)
    votes = [decode_envelope(vote) for vote in certificate.votes]
    votes[1] = msgspec.structs.replace(votes[1], author=NAMES[3])
    changed = msgspec.structs.replace(certificate, votes=tuple(encode_envelope(vote) for vote in votes)).encode()
    found = fault([*ENTRIES[:2], replace(ENTRIES[2], certificate=changed)])
    assert found.round == 3
    assert "is invalid" in found.reason


def test_too_few_votes_are_rejected() -> None:
    few = certify(CHAIN[2].record, voters=2)
    found = fault([*ENTRIES[:2], replace(ENTRIES[2], certificate=few)])
    assert (found.round, "2 votes" in found.reason) == (3, True)


def test_the_chain_of_another_run_is_rejected() -> None:
    with pytest.raises(BadLedger, match="round 1: invalid certificate"):
        verified(ENTRIES, replace(RULES, run_id=b"q" * 32))


def test_more_rounds_than_the_run_has_are_rejected() -> None:
    with pytest.raises(BadLedger, match="round 5: it follows round 4 of 4"):
        verified(ENTRIES, replace(RULES, rounds=4))


def test_a_round_that_does_not_follow_is_rejected() -> None:
    other = chain(3, left_out=lambda round_number: 1)
    found = fault([*ENTRIES[:2], other[2].entry])
    assert (found.round, "does not follow" in found.reason) == (3, True)


# ------------------------------------------ certified by all members, but invalid


def tokens(record: Record, node: str) -> Record:
    given = tuple(
        Accepted(
            one.node, msgspec.structs.replace(one.contribution, tokens=one.contribution.tokens + (one.node == node))
        )
        for one in record.accepted
    )
    return msgspec.structs.replace(record, accepted=given)


def with_excess_quota(record: Record) -> Record:
    """Plan more than H inner steps for the first member; it claims no more."""
    first, *others = record.plan.members
    more = msgspec.structs.replace(first, inner_steps=first.inner_steps + 1)
    return msgspec.structs.replace(record, plan=msgspec.structs.replace(record.plan, members=(more, *others)))


INVALID_RECORDS: dict[str, tuple[str, Callable[[Record], Record]]] = {
    "seed": ("data is not what follows", with_plan(seed=b"s" * 32)),
    "position": ("data is not what follows", with_plan(position=7)),
    "base": ("another state", with_plan(base_root=b"b" * 32)),
    "previous": ("does not follow", with_plan(previous=b"p" * 32)),
    "term": ("its term 3 is not above that of round 2, 3", with_plan(term=3)),
    "a quota above H": ("is given 6 inner steps, and H is 5", lambda record: with_excess_quota(record)),
    "tokens": (f"contribution of {NAMES[1][-6:]}: the tokens", lambda record: tokens(record, NAMES[1])),
    "order": (
        "ascending order",
        lambda record: msgspec.structs.replace(record, accepted=tuple(reversed(record.accepted))),
    ),
    "both": (
        "both accepted and excluded",
        lambda record: msgspec.structs.replace(record, excluded=(Excluded(NAMES[0], ExclusionReason.NO_COMMITMENT),)),
    ),
    "a standing": (
        "does not follow",
        lambda record: msgspec.structs.replace(record, standing=record.standing[1:]),
    ),
    "unearned weight": (
        "does not follow",
        lambda record: msgspec.structs.replace(
            record,
            standing=tuple(msgspec.structs.replace(one, weight=one.weight + 1) for one in record.standing),
        ),
    ),
    "a stranger": (
        "not a member",
        lambda record: msgspec.structs.replace(
            record, excluded=(Excluded(STRANGER.peer_id, ExclusionReason.NO_COMMITMENT),)
        ),
    ),
}


@pytest.mark.parametrize("name", INVALID_RECORDS)
def test_a_quorum_cannot_certify_an_invalid_record(name: str) -> None:
    reason, edit = INVALID_RECORDS[name]
    third = link(CHAIN[1], edit=lambda record: edit(record))
    found = fault([*ENTRIES[:2], third.entry])
    assert found.round == 3
    assert reason in found.reason


def test_a_gap_does_not_hide_data_that_is_used_twice() -> None:
    later: Link = link(
        CHAIN[3], edit=lambda r: msgspec.structs.replace(r, plan=msgspec.structs.replace(r.plan, position=0))
    )
    assert "its data begin before" in fault([ENTRIES[0], later.entry]).reason


def test_a_claim_is_read_without_proof() -> None:
    assert claimed(CHAIN[0].certificate).record == CHAIN[0].record


def test_voters_that_no_record_names_are_rejected() -> None:
    """The previous record names the electorate; that of the first round is named by a reconfiguration."""

    def usurped(record: Record) -> Record:
        return with_electorate(record, NAMES[1:])

    first = chain(1)[0]
    second = link(first, edit=usurped)
    assert "the electorate is not that of the record before" in fault([first.entry, second.entry]).reason
    unfounded = link(None, edit=lambda record: msgspec.structs.replace(record, reconfiguration=0))
    assert "no reconfiguration names its voters" in fault([unfounded.entry]).reason
