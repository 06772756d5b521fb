"""Verification of a ledger file: any tampering is detected and located."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.ledger.store import NAME, Ledger, LedgerError
from psyche.ledger.verify import verify_ledger
from psyche.network.identity import Identity
from psyche.protocol.audit_messages import Closed
from psyche.protocol.chain import BadLedger
from psyche.protocol.messages import Certificate, Excluded, ExclusionReason, Record
from psyche.protocol.wire import decode, decode_envelope, encode_envelope
from tests.chains import COORDINATOR, MANIFEST, MEMBERS, NAMES, RULES, STRANGER, certify, chain
from tests.ledgers import CHAIN, EACH, OTHER, change, fill


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("ledger") / NAME)


@contextmanager
def copied(valid: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copy(valid, Path(folder) / NAME))


def fault(path: Path) -> BadLedger:
    with pytest.raises(BadLedger) as caught:
        verify_ledger(path, MANIFEST)
    return caught.value


def held(path: Path, query: str, *values: object) -> object:
    """Return the single value that a query finds."""
    with sqlite3.connect(path) as reader:
        (found,) = reader.execute(query, values).fetchone()
    reader.close()
    return found


def test_a_valid_ledger_is_verified(valid: Path) -> None:
    found = verify_ledger(valid, MANIFEST)
    assert (found.rounds, found.last, found.missing, found.reconfigurations) == (6, 6, [], 0)
    assert found.tokens == dict.fromkeys(NAMES[:-1], 6 * EACH) | {NAMES[-1]: 3 * EACH}


COLUMNS = ["record_hash", "previous", "base_root", "reconfiguration", "certificate"]
COUNTS = ["votes", "quota_steps", "tokens", "inner_steps", "payload_bytes", "private", "dissenter", "payout"]
VALUES = st.one_of(
    st.integers(2, 2**40), st.binary(min_size=1, max_size=40), st.text(min_size=1, max_size=9), st.none()
)


@given(st.integers(1, 6), st.sampled_from(COLUMNS), VALUES)
@settings(deadline=None, max_examples=40)
def test_a_changed_round_is_located(valid: Path, round_number: int, column: str, value: object) -> None:
    with copied(valid) as path:
        before = held(path, f"SELECT {column} FROM rounds WHERE round = ?", round_number)
        try:
            change(path, f"UPDATE rounds SET {column} = ? WHERE round = ?", value, round_number)
        except sqlite3.IntegrityError:
            return  # SQLite rejects it
        if held(path, f"SELECT {column} FROM rounds WHERE round = ?", round_number) == before:
            return  # SQLite stores a text of digits as the same number
        if column == "certificate" and not isinstance(value, bytes):
            with pytest.raises(LedgerError, match=f"round {round_number} has no certificate"):
                verify_ledger(path, MANIFEST)
        else:
            assert fault(path).round == round_number


@given(st.integers(1, 6), st.sampled_from(NAMES), st.sampled_from([*COUNTS, "reason", "node"]), VALUES)
@settings(deadline=None, max_examples=60)
def test_a_changed_member_row_is_located_by_its_round(
    valid: Path, round_number: int, node: str, column: str, value: object
) -> None:
    with copied(valid) as path:
        where = "WHERE round = ? AND node = ?"
        before = held(path, f"SELECT {column} FROM members {where}", round_number, node)
        try:
            change(path, f"UPDATE members SET {column} = ? {where}", value, round_number, node)
        except sqlite3.IntegrityError:
            return
        if column == "node" or held(path, f"SELECT {column} FROM members {where}", round_number, node) != before:
            assert fault(path).round == round_number


@given(st.integers(1, 6), st.sampled_from(NAMES))
@settings(deadline=None, max_examples=10)
def test_a_deleted_member_row_is_located_by_its_round(valid: Path, round_number: int, node: str) -> None:
    with copied(valid) as path:
        assert change(path, "DELETE FROM members WHERE round = ? AND node = ?", round_number, node) == 1
        assert fault(path).round == round_number


@given(st.integers(1, 5), st.binary(min_size=32, max_size=32))
@settings(deadline=None, max_examples=10)
def test_a_changed_state_root_is_contradicted_by_the_next_round(valid: Path, round_number: int, root: bytes) -> None:
    with copied(valid) as path:
        change(path, "UPDATE rounds SET state_root = ? WHERE round = ?", root, round_number)
        assert fault(path).round == round_number + 1


@given(st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None, max_examples=15)
def test_swapped_rounds_are_located(valid: Path, one: int, other: int) -> None:
    if one == other:
        return
    with copied(valid) as path:
        for table in ("rounds", "members"):
            for old, new in ((one, 99), (other, one), (99, other)):
                change(path, f"UPDATE {table} SET round = ? WHERE round = ?", new, old)
        assert fault(path).round == min(one, other)


@given(st.integers(1, 6))
@settings(deadline=None, max_examples=6)
def test_a_record_from_another_chain_breaks_the_chain(valid: Path, round_number: int) -> None:
    """Its row is that of a record that the same members certified."""
    with copied(valid) as path:
        for table in ("rounds", "members"):
            change(path, f"DELETE FROM {table} WHERE round = ?", round_number)
        with tempfile.TemporaryDirectory() as folder:
            foreign = fill(Path(folder) / NAME, [OTHER[round_number - 1]])
            with sqlite3.connect(path) as forger:
                forger.execute("ATTACH ? AS foreign_ledger", (str(foreign),))
                for table in ("rounds", "members"):
                    forger.execute(f"INSERT INTO {table} SELECT * FROM foreign_ledger.{table}")
            forger.close()
        assert fault(path).round == max(round_number, 2), "the second record contradicts a replaced first"


@given(st.sets(st.integers(1, 6), min_size=1, max_size=5))
@settings(deadline=None, max_examples=15)
def test_missing_rounds_are_listed(valid: Path, gone: set[int]) -> None:
    with copied(valid) as path:
        for round_number in gone:
            change(path, "DELETE FROM rounds WHERE round = ?", round_number)
        assert "members or audits but no certificate" in fault(path).reason
        for round_number in gone:
            change(path, "DELETE FROM members WHERE round = ?", round_number)
        found = verify_ledger(path, MANIFEST)
        last = max(set(range(1, 7)) - gone)
        assert [round_number for gap in found.missing for round_number in gap] == sorted(
            one for one in gone if one < last
        )
        assert found.rounds == 6 - len(gone)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.9999])
def test_a_truncated_file_is_rejected(valid: Path, share: float) -> None:
    with copied(valid) as path:
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(LedgerError, match=str(path)):
            verify_ledger(path, MANIFEST)


def test_a_changed_vote_is_located(valid: Path) -> None:
    with copied(valid) as path:
        (certificate,) = [one.certificate for one in CHAIN if one.record.plan.round == 4]
        forged = certificate[:-3] + bytes([certificate[-3] ^ 1]) + certificate[-2:]
        change(path, "UPDATE rounds SET certificate = ? WHERE round = 4", forged)
        assert fault(path).round == 4
        assert "is invalid" in fault(path).reason
        change(path, "UPDATE rounds SET certificate = ? WHERE round = 4", certify(CHAIN[3].record, voters=2))
        assert "2 votes have 5" in fault(path).reason


def test_a_ledger_proves_that_a_round_was_certified_twice(valid: Path) -> None:
    with copied(valid) as path:
        with Ledger.open(path, RULES.run_id) as ledger:
            other = chain(5, left_out=lambda round_number: round_number % 2 if round_number < 5 else 2)[4]
            ledger.supersede(other.certificate, other.record, other.root)
        found = fault(path)
        assert (found.round, "certified twice" in found.reason) == (5, True)
        foreign = chain(6, flavour=b"other")[5]
        with Ledger.open(path, RULES.run_id) as ledger:
            change(path, "DELETE FROM superseded")
            ledger.supersede(foreign.certificate, foreign.record, foreign.root)
        found = fault(path)
        assert (found.round, "certified twice" in found.reason) == (5, True), "round 6 is built on another round 5"
        change(path, "UPDATE superseded SET certificate = ?", b"made up")
        assert "invalid certificate" in fault(path).reason


# ---------------------------------------------------------------- signatures by other keys


def resigned(certificate: bytes, what: str, number: int, by: Identity) -> bytes:
    """Return the certificate with one envelope signed by another key, in that key's name."""
    content = decode(Certificate, certificate)
    if what == "proposal":
        return msgspec.structs.replace(content, proposal=forged(content.proposal, by)).encode()
    items = list(getattr(content, what))
    items[number % len(items)] = forged(items[number % len(items)], by)
    return msgspec.structs.replace(content, **{what: tuple(items)}).encode()


def forged(envelope: bytes, by: Identity) -> bytes:
    old = decode_envelope(envelope)
    return encode_envelope(by.seal(old.domain, old.run_id, old.round, old.body))


@given(
    st.integers(1, 6), st.sampled_from(["proposal", "seals"]), st.integers(0, 9), st.sampled_from([STRANGER, *MEMBERS])
)
@settings(deadline=None, max_examples=30)
def test_proposals_and_seals_signed_by_other_keys_are_rejected(
    valid: Path, round_number: int, what: str, number: int, by: Identity
) -> None:
    with copied(valid) as path:
        again = resigned(CHAIN[round_number - 1].certificate, what, number, by)
        change(path, "UPDATE rounds SET certificate = ? WHERE round = ?", again, round_number)
        found = fault(path)
        assert found.round == round_number
        assert "which is not a coordinator" in found.reason


@given(st.integers(1, 6), st.integers(0, 3), st.sampled_from([STRANGER, COORDINATOR]))
@settings(deadline=None, max_examples=15)
def test_votes_signed_by_other_keys_do_not_count(valid: Path, round_number: int, number: int, by: Identity) -> None:
    with copied(valid) as path:
        again = resigned(CHAIN[round_number - 1].certificate, "votes", number, by)
        again = resigned(again, "votes", number + 1, by)
        change(path, "UPDATE rounds SET certificate = ? WHERE round = ?", again, round_number)
        assert (fault(path).round, "votes have" in fault(path).reason) == (
            round_number,
            True,
        )


CHANGES: dict[str, Callable[[Record], Record]] = {
    "more tokens": lambda record: with_contribution(record, tokens=EACH + 1),
    "another payout": lambda record: with_contribution(record, payout=b"p" * 20),
    "another root": lambda record: with_contribution(record, trace_root=b"t" * 32),
    "an audit": lambda record: with_audit_state(record, closed=(Closed(NAMES[0], 1, "passed", (NAMES[1],), (), 9),)),
    "a conviction": lambda record: with_audit_state(record, closed=(Closed(NAMES[0], 1, "convicted", (), (), 0),)),
    "a ban": lambda record: with_audit_state(record, banned=(NAMES[1],)),
    "a false dissenter": lambda record: msgspec.structs.replace(record, dissenters=(NAMES[1],)),
    "a false exclusion": lambda record: msgspec.structs.replace(
        record, excluded=(Excluded(NAMES[-1], ExclusionReason.NOT_HELD),)
    ),
}


def with_contribution(record: Record, **changes: object) -> Record:
    first, *others = record.accepted
    mine = msgspec.structs.replace(first, contribution=msgspec.structs.replace(first.contribution, **changes))
    return msgspec.structs.replace(record, accepted=(mine, *others))


def with_audit_state(record: Record, **changes: object) -> Record:
    return msgspec.structs.replace(record, audit_state=msgspec.structs.replace(record.audit_state, **changes))


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("rows", [False, True], ids=["certificate", "and rows"])
@pytest.mark.parametrize("votes", [True, False], ids=["old votes", "no votes"])
def test_a_coordinator_alone_cannot_rewrite_a_record(valid: Path, name: str, rows: bool, votes: bool) -> None:
    """With its key and the file it proposes and seals another record, with the votes for the first one or none."""
    old = CHAIN[3]
    record = CHANGES[name](old.record)
    assert record.hash != old.record.hash
    certificate = decode(Certificate, certify(record, voters=0))
    if votes:
        certificate = msgspec.structs.replace(certificate, votes=decode(Certificate, old.certificate).votes)
    with copied(valid) as path:
        if rows:
            with Ledger.open(path, RULES.run_id) as ledger:
                for table in ("rounds", "members", "audits"):
                    change(path, f"DELETE FROM {table} WHERE round >= 4")
                ledger.append(certificate.encode(), record, old.root)
        else:
            change(path, "UPDATE rounds SET certificate = ? WHERE round = 4", certificate.encode())
        found = fault(path)
        assert found.round == 4
        assert ("is for something else" if votes else "0 votes have 0.0% of the weight") in found.reason


@given(st.integers(0, 2**30), st.integers(1, 255))
@settings(deadline=None, max_examples=60)
def test_a_changed_byte_of_the_file_is_detected_or_has_no_effect(valid: Path, at: int, flip: int) -> None:
    """Undetected bytes are unused.

    They are leftovers of earlier SQLite pages, or the state root of the last round, which only the next record proves.
    """
    with copied(valid) as path:
        content = bytearray(path.read_bytes())
        content[at % len(content)] ^= flip
        path.write_bytes(content)
        before = verify_ledger(valid, MANIFEST)
        try:
            found = verify_ledger(path, MANIFEST)
        except (LedgerError, BadLedger):
            return
        with Ledger.read(path) as ledger, Ledger.read(valid) as untouched:
            (*proven, last), (*others, end) = list(ledger.entries()), list(untouched.entries())
            assert (proven, last.certificate) == (others, end.certificate)
        assert found.credits.accounts == before.credits.accounts


@pytest.mark.parametrize("round_number", [1, 4, 6])
def test_an_invented_audit_is_located(valid: Path, round_number: int) -> None:
    with copied(valid) as path:
        change(path, "INSERT INTO audits VALUES (?, 0, ?, 1, 'passed', 5, '', '')", round_number, NAMES[0])
        assert (fault(path).round, "its rows in audits do not match" in fault(path).reason) == (round_number, True)
        change(path, "UPDATE audits SET round = 99")
        assert fault(path).round == 99
