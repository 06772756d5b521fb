"""Ledger files hold one chain of one run, survive crashes, and are not confused with other files."""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.ledger.schema import member_rows, round_row
from psyche.ledger.store import Forked, Ledger, LedgerError
from psyche.protocol.chain import Entry
from tests.chains import NAMES, REASON, RULES, Link, chain, link, verified

CHAIN = chain(6)
OTHER = chain(6, flavour=b"other")
RUN, GENESIS = RULES.run_id, RULES.genesis


def append(ledger: Ledger, one: Link, root: bytes | None = b"") -> None:
    ledger.append(one.certificate, one.record, one.root if root == b"" else root)


def append_all(ledger: Ledger, links: list[Link]) -> None:
    for one in links:
        append(ledger, one)


def examine(path: Path) -> None:
    with Ledger.read(path) as ledger:
        ledger.check_pages()


def filled(path: Path, links: list[Link] = CHAIN) -> Path:
    with Ledger.open(path, RUN) as ledger:
        append_all(ledger, links)
    return path


def holds(ledger: Ledger, links: list[Link]) -> bool:
    return list(ledger.entries()) == [one.entry for one in links]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node" / "ledger.sqlite"


def test_appended_rounds_are_there_after_reopening(path: Path) -> None:
    filled(path)
    with Ledger.open(path, RUN) as ledger:
        assert holds(ledger, CHAIN)
        assert ledger.run_id == RUN
        assert ledger.missing() == ()
        assert list(ledger.entries(5)) == [one.entry for one in CHAIN[4:]]
        assert ledger.hash_of(6) == CHAIN[5].record.hash
        assert ledger.hash_of(7) is None
        for one in CHAIN:
            round_number = one.record.plan.round
            assert ledger.row(round_number) == round_row(one.record)
            assert ledger.member_rows(round_number) == member_rows(one.record)
    verified([one.entry for one in CHAIN])


def test_a_ledger_can_be_queried_in_sql(path: Path) -> None:
    query = "SELECT sum(tokens), sum(inner_steps), count(reason), max(reason) FROM members WHERE node = ?"
    with sqlite3.connect(filled(path)) as reader:
        tokens, steps, left_out, reason = reader.execute(query, (NAMES[-1],)).fetchone()
    assert (tokens, steps) == (3 * RULES.inner_steps * RULES.tokens_per_step, 3 * RULES.inner_steps)
    assert (left_out, reason) == (3, REASON)


def test_rounds_are_read_page_by_page(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psyche.ledger.store._PAGE", 2)
    with Ledger.read(filled(path)) as ledger:
        assert holds(ledger, CHAIN)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=14))
@settings(deadline=None, max_examples=30)
def test_rounds_can_be_appended_in_any_order_and_repeatedly(order: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder, Ledger.open(Path(folder) / "ledger.sqlite", RUN) as ledger:
        for at in order:
            append(ledger, CHAIN[at])
        there = sorted(set(order))
        assert holds(ledger, [CHAIN[at] for at in there])
        assert [round_number for gap in ledger.missing() for round_number in gap] == [
            at + 1 for at in range(there[-1]) if at not in there
        ]


@given(st.integers(0, 5), st.integers(0, 5))
@settings(deadline=None, max_examples=25)
def test_a_record_that_contradicts_the_chain_is_refused_and_changes_nothing(upto: int, at: int) -> None:
    """It is another record of a known round, or follows from another record than the last one."""
    with tempfile.TemporaryDirectory() as folder, Ledger.open(Path(folder) / "ledger.sqlite", RUN) as ledger:
        for one in CHAIN[: upto + 1]:
            append(ledger, one)
        other = chain(at + 1, left_out=lambda round_number: 2)[at]
        if at > upto + 1:
            append(ledger, other)  # after a gap it cannot be told which chain it belongs to
            return
        with pytest.raises(Forked, match=r"certified twice.*keep this file as proof"):
            append(ledger, other)
        assert holds(ledger, CHAIN[: upto + 1])


def test_the_first_record_must_follow_from_the_run(path: Path) -> None:
    (foreign,) = chain(
        1, edit=lambda r: msgspec.structs.replace(r, plan=msgspec.structs.replace(r.plan, previous=GENESIS))
    )
    with Ledger.open(path, RUN) as ledger:
        for use in (ledger.append, ledger.supersede):
            with pytest.raises(Forked, match="round 1 belongs to run"):
                use(foreign.certificate, foreign.record, None)
        assert ledger.rounds() == []


def test_an_earlier_record_must_be_the_one_its_successor_follows(path: Path) -> None:
    with Ledger.open(path, RUN) as ledger:
        append(ledger, CHAIN[1])
        with pytest.raises(Forked):
            append(ledger, chain(1, left_out=lambda round_number: 3)[0])
        append(ledger, CHAIN[0])
        assert holds(ledger, CHAIN[:2])


def test_a_certificate_of_another_record_raises_value_error(path: Path) -> None:
    with Ledger.open(path, RUN) as ledger, pytest.raises(ValueError, match="another record"):
        ledger.append(CHAIN[1].certificate, CHAIN[0].record, None)


def test_a_state_root_is_corrected_by_the_next_rounds_base(path: Path) -> None:
    """A node's own root may be wrong or unknown; the next round's plan decides."""
    with Ledger.open(path, RUN) as ledger:
        append(ledger, CHAIN[0], None)
        append(ledger, CHAIN[1], b"w" * 32)
        assert [one.state_root for one in ledger.entries()] == [CHAIN[0].root, b"w" * 32]
        append(ledger, CHAIN[1], None)
        assert [one.state_root for one in ledger.entries()][1] == b"w" * 32
        append(ledger, CHAIN[1])
        append(ledger, CHAIN[2], None)
        append(ledger, CHAIN[0], b"w" * 32)
        assert [one.state_root for one in ledger.entries()] == [CHAIN[0].root, CHAIN[1].root, None]


@pytest.mark.parametrize(
    ("at", "keeps", "moved"),
    [(5, 4, 2), (3, 2, 4), (2, 1, 5), (1, 1, 5), (0, 0, 6)],
)
def test_a_record_that_supersedes_others_is_accepted_and_the_others_are_kept_as_proof(
    path: Path, at: int, keeps: int, moved: int
) -> None:
    """``OTHER`` has other states from round 1 on, and so other records from round 2 on."""
    filled(path)
    other = OTHER[at] if at else chain(1, left_out=lambda round_number: 3)[0]
    with Ledger.open(path, RUN) as ledger:
        assert ledger.supersede(other.certificate, other.record, other.root) == moved
        kept = [one.entry for one in CHAIN[:keeps]]
        if at == 1:  # follows from the same record but another state
            kept = [replace(CHAIN[0].entry, state_root=OTHER[0].root)]
        assert list(ledger.entries()) == [*kept, other.entry]
        assert ledger.superseded() == [one.entry for one in CHAIN[6 - moved :]]
        assert ledger.strays() == []
        if at == 5:
            append(ledger, link(other))
            assert ledger.missing() == (range(5, 6),)


def test_threads_share_a_ledger(path: Path) -> None:
    with Ledger.open(path, RUN) as ledger:
        threads = [threading.Thread(target=append, args=(ledger, one)) for one in CHAIN for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert holds(ledger, CHAIN)


def test_a_ledger_can_be_read_while_it_is_written(path: Path) -> None:
    with Ledger.open(path, RUN) as ledger:
        append(ledger, CHAIN[0])
        with Ledger.read(path) as reader:
            entries = reader.entries()
            assert next(entries).round == 1
            append(ledger, CHAIN[1])
            assert reader.rounds() == [1, 2]
            with pytest.raises(LedgerError):
                reader.append(CHAIN[2].certificate, CHAIN[2].record, None)


# ----------------------------------------------------------------------------------- foreign files


def test_another_runs_ledger_is_refused(path: Path) -> None:
    filled(path)
    with pytest.raises(LedgerError, match=r"ledger of another run .* choose another --directory"):
        Ledger.open(path, b"o" * 32)
    with Ledger.open(path, RUN) as ledger:
        assert holds(ledger, CHAIN)


def test_another_formats_ledger_is_refused(path: Path) -> None:
    filled(path)
    with sqlite3.connect(path) as writer:
        writer.execute("PRAGMA user_version = 99")
    for use in (lambda: Ledger.open(path, RUN), lambda: Ledger.read(path)):
        with pytest.raises(LedgerError, match="a ledger of format 99, and this psyche reads 4: use the version"):
            use()


@pytest.mark.parametrize("make", ["text", "database", "folder"])
def test_other_files_are_refused_and_left_unchanged(path: Path, make: str) -> None:
    path.parent.mkdir()
    if make == "folder":
        path.mkdir()
    elif make == "text":
        path.write_text("the accounts of a grocer\n" * 100)
    else:
        with sqlite3.connect(path) as writer:
            writer.execute("CREATE TABLE rounds (round)")
    before = path.read_bytes() if path.is_file() else b""
    for use in (lambda: Ledger.open(path, RUN), lambda: Ledger.read(path)):
        with pytest.raises(LedgerError, match=str(path)):
            use()
    assert not path.is_file() or path.read_bytes() == before


def test_an_empty_file_becomes_a_ledger(path: Path) -> None:
    """Its creator was killed before it wrote the header."""
    path.parent.mkdir()
    path.touch()
    with pytest.raises(LedgerError, match="not a psyche ledger"):
        Ledger.read(path)
    filled(path)
    with Ledger.read(path) as ledger:
        assert holds(ledger, CHAIN)


def test_reading_a_missing_ledger_is_an_error(path: Path) -> None:
    with pytest.raises(LedgerError, match="there is no ledger at"):
        Ledger.read(path)
    assert not path.exists()


def test_a_full_disk_is_reported_with_a_remedy(path: Path) -> None:
    with Ledger.open(path, RUN) as ledger:
        append(ledger, CHAIN[0])
        pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
        ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(LedgerError, match=r"disk is full.*free disk space"):
            append_all(ledger, CHAIN[1:])
        rounds = ledger.rounds()
        assert holds(ledger, CHAIN[: len(rounds)])


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_detected(path: Path, share: float) -> None:
    filled(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(LedgerError, match=r"damaged|not a psyche ledger"):
        examine(path)


def test_an_invalid_record_hash_is_reported_as_damage(path: Path) -> None:
    filled(path)
    with sqlite3.connect(path) as forger:
        forger.execute("UPDATE rounds SET record_hash = 'six' WHERE round = 6")
    with Ledger.open(path, RUN) as ledger, pytest.raises(LedgerError, match="the record hash of round 6 is not a hash"):
        append(ledger, CHAIN[5])


# ------------------------------------------------------------------------------------------- kills


def test_a_killed_writer_leaves_a_valid_chain(tmp_path: Path) -> None:
    """SIGKILL at many moments: while creating the file, during a transaction and between two."""
    for turn in range(40):
        folder = tmp_path / str(turn)
        folder.mkdir()
        wait = 0.002 + 0.0037 * turn
        committed = _killed_after(folder, wait)
        for file in sorted(folder.glob("*.sqlite")):
            if turn % 2:  # a reader rolls back unfinished transactions, too
                found = readable_entries(file)
                assert found == [one.entry for one in CHAIN[: len(found)]]
            with Ledger.open(file, RUN) as ledger:
                rounds = ledger.rounds()
                assert holds(ledger, CHAIN[: len(rounds)])
                ledger.check_pages()
                assert len(rounds) >= committed.get(int(file.stem), 0), "a committed round is lost"
                for one in CHAIN:
                    append(ledger, one)
                assert holds(ledger, CHAIN)


def readable_entries(path: Path) -> list[Entry]:
    """Return the entries that a reader finds; none if the file was never initialised."""
    try:
        with Ledger.read(path) as ledger:
            return list(ledger.entries())
    except LedgerError:
        if path.stat().st_size:
            raise
        return []


def _killed_after(folder: Path, wait: float) -> dict[int, int]:
    """Return the last round committed to each file in ``folder`` by a writer killed after ``wait`` seconds."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            for number in itertools.count():
                with Ledger.open(folder / f"{number:05d}.sqlite", RUN) as ledger:
                    for one in CHAIN:
                        append(ledger, one)
                        os.write(write, b"%d %d\n" % (number, one.record.plan.round))
        finally:
            os._exit(1)
    os.close(write)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    committed: dict[int, int] = {}
    with os.fdopen(read) as pipe:
        for line in pipe:
            number, round_number = line.split()
            committed[int(number)] = int(round_number)
    return committed
