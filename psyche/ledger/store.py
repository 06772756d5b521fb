"""The ledger: the certified chain of a run, one SQLite file on every node.

A round is one row of ``rounds``; its certificate is the proof, everything else in the file is read off it so that it
can be asked for in SQL, and is checked against it (``psyche ledger verify``). What the run went back on is kept as
evidence in ``superseded``.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from psyche.errors import PsycheError
from psyche.ledger.schema import (
    APPLICATION,
    SCHEMA,
    VERSION,
    AuditRow,
    MemberRow,
    RoundRow,
    audit_rows,
    member_rows,
    round_row,
)
from psyche.protocol.ledger import Entry, claimed, missing_rounds
from psyche.protocol.messages import Record

NAME = "ledger.sqlite"
_WAIT_SECONDS = 30.0
"""For another process that reads the file, or writes it."""
_PAGE = 64
"""Rounds read at a time."""


class LedgerError(PsycheError):
    """A ledger file cannot be used; the message says why, and the mend."""


class Forked(LedgerError):
    """Two certified records claim one place in the chain."""


class Ledger:
    """The ledger file of one node. Threads may share it. Every method raises :class:`LedgerError` on a bad file."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        """Use :meth:`open` or :meth:`read`."""
        self.path = path
        self._connection = connection
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, run_id: bytes) -> Self:
        """The ledger of run ``run_id`` at ``path``, made where there is none. Raises :class:`LedgerError`."""
        with _naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            ledger = cls(path, _connect(path, "rwc"))
        with _closing_on_error(ledger), _naming(path):
            # EXTRA is FULL, and flushes the directory after the journal is gone: a round that is in stays in.
            ledger._connection.execute("PRAGMA synchronous = EXTRA")
            with ledger._transaction() as cursor:
                if _is_blank(cursor):
                    for statement in SCHEMA:
                        cursor.execute(statement)
                    cursor.execute("INSERT INTO run VALUES (?)", (run_id,))
            ledger._check_kind()
            if ledger.run_id != run_id:
                raise LedgerError(
                    f"{path} is the ledger of another run ({ledger.run_id.hex()[:16]}…): choose another --directory, "
                    "or move it away"
                )
        return ledger

    @classmethod
    def read(cls, path: Path) -> Self:
        """A ledger to look at, whatever its run. Raises :class:`LedgerError`."""
        if not path.is_file():
            raise LedgerError(f"there is no ledger at {path}: give a node's or a coordinator's directory, or its file")
        with _naming(path):
            # What a killed process left half done is undone by whoever opens the file next, if it may write.
            ledger = cls(path, _connect(path, "rw" if os.access(path, os.W_OK) else "ro"))
        with _closing_on_error(ledger), _naming(path):
            ledger._check_kind()
            ledger._connection.execute("PRAGMA query_only = ON")
        return ledger

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; nothing may be asked of the ledger afterwards."""
        with self._lock:
            self._connection.close()

    # --------------------------------------------------------------------------------------- writing

    def append(self, certificate: bytes, record: Record, state_root: bytes | None) -> None:
        """Put a certified round in its place, durably; rounds may be missing, before it and elsewhere.

        ``certificate``, checked before, proves ``record``, which is built on the record before, or on the run id;
        ``state_root`` is what this node holds after it, None where it does not know. The same record again changes
        nothing but that: what the round after builds on counts most, then the last word. Raises :class:`Forked`, and
        leaves the file as it was, where another record has that place or a neighbour in the chain is not this one's.
        """
        with self._transaction() as cursor:
            self._append(cursor, certificate, record, state_root)

    def supersede(self, certificate: bytes, record: Record, state_root: bytes | None) -> int:
        """Like :meth:`append`, for a record that the run goes on from although another has its place here.

        What contradicts it (that record and all after it; the one before where it is not the one built on) is moved
        to ``superseded``: a proof that the run went back. Returns how many records that were.
        """
        round_number = record.plan.round
        with self._transaction() as cursor:
            before = _hash_at(cursor, round_number - 1)
            first = round_number - (before is not None and before != record.plan.previous)
            cursor.execute(
                "INSERT OR IGNORE INTO superseded "
                "SELECT record_hash, round, state_root, certificate FROM rounds WHERE round >= ?",
                (first,),
            )
            cursor.execute("DELETE FROM members WHERE round >= ?", (first,))
            cursor.execute("DELETE FROM audits WHERE round >= ?", (first,))
            moved = cursor.execute("DELETE FROM rounds WHERE round >= ?", (first,)).rowcount
            self._append(cursor, certificate, record, state_root)
        return moved

    def _append(self, cursor: sqlite3.Cursor, certificate: bytes, record: Record, state_root: bytes | None) -> None:
        if claimed(certificate).record != record:
            raise ValueError("the certificate is that of another record")
        row = round_row(record)
        round_number, own, previous, base_root, _ = row
        there, before = _hash_at(cursor, round_number), _hash_at(cursor, round_number - 1)
        if round_number == 1:
            before = bytes(cursor.execute("SELECT run_id FROM run").fetchone()[0])
        if there not in (None, own):
            raise self._forked(round_number, there, own)
        if before not in (None, previous):
            raise self._forked(round_number - 1, before, previous)
        after = cursor.execute(
            "SELECT previous, base_root, record_hash FROM rounds WHERE round = ?", (round_number + 1,)
        ).fetchone()
        if after is not None and after[0] != own:
            raise self._forked(round_number, after[0], own)
        root = state_root if after is None else after[1]
        if there is None:
            cursor.execute("INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?)", (*row[:4], root, row[4], certificate))
            cursor.executemany("INSERT INTO members VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", member_rows(record))
            cursor.executemany("INSERT INTO audits VALUES (?, ?, ?, ?, ?, ?, ?, ?)", audit_rows(record))
        elif root is not None:
            cursor.execute("UPDATE rounds SET state_root = ? WHERE round = ?", (root, round_number))
        # A quorum has voted for what this round builds on: a node that had found something else was wrong.
        cursor.execute("UPDATE rounds SET state_root = ? WHERE round = ?", (base_root, round_number - 1))

    def _forked(self, round_number: int, there: bytes | None, other: bytes) -> Forked:
        name = there.hex()[:12] if there else "none"
        return Forked(
            f"round {round_number} was certified twice: {self.path} holds record {name}, and {other.hex()[:12]} claims "
            "its place; keep the file, it is the proof"
            if round_number
            else f"the first round is built on run {other.hex()[:12]}, and {self.path} is the ledger of run {name}"
        )

    # --------------------------------------------------------------------------------------- reading

    @property
    def run_id(self) -> bytes:
        """The run whose chain this is."""
        with self._lock, _naming(self.path):
            rows = self._connection.execute("SELECT run_id FROM run LIMIT 2").fetchall()
        if len(rows) != 1 or not isinstance(rows[0][0], bytes):
            raise LedgerError(f"{self.path} does not say whose run it is of: move it away")
        return rows[0][0]

    def rounds(self) -> list[int]:
        """The rounds that are there, ascending."""
        return [round_number for (round_number,) in self._select("SELECT round FROM rounds ORDER BY round")]

    def missing(self) -> tuple[range, ...]:
        """The rounds before the last one that are not there."""
        return missing_rounds(self.rounds())

    def hash_of(self, round_number: int) -> bytes | None:
        """The record hash of a round; None where it is not there."""
        with self._lock, _naming(self.path):
            return _hash_at(self._connection.cursor(), round_number)

    def entries(self, first: int = 1) -> Iterator[Entry]:
        """The rounds from ``first`` on that are there, ascending. Nothing in them is checked."""
        query = "SELECT round, certificate, state_root FROM rounds WHERE round >= ? ORDER BY round LIMIT ?"
        while page := [self._entry(row) for row in self._select(query, first, _PAGE)]:
            yield from page
            first = page[-1].round + 1

    def entry(self, round_number: int) -> Entry | None:
        """The round as it is there, if it is. Nothing in it is checked."""
        query = "SELECT round, certificate, state_root FROM rounds WHERE round = ?"
        return next((self._entry(row) for row in self._select(query, round_number)), None)

    def superseded(self) -> list[Entry]:
        """Records that the run went back on, by round."""
        query = "SELECT round, certificate, state_root FROM superseded ORDER BY round, record_hash"
        return [self._entry(row) for row in self._select(query)]

    def row(self, round_number: int) -> RoundRow | None:
        """What the file says of a round beside its certificate; :func:`round_row` of its record, or it was changed."""
        query = "SELECT round, record_hash, previous, base_root, reconfiguration FROM rounds WHERE round = ?"
        return next(iter(self._select(query, round_number)), None)

    def member_rows(self, round_number: int) -> list[MemberRow]:
        """What the file says of a round's members; :func:`member_rows` of its record, or it was changed."""
        return self._select("SELECT * FROM members WHERE round = ? ORDER BY node", round_number)

    def audit_rows(self, round_number: int) -> list[AuditRow]:
        """What the file says of audits that ended with a round; :func:`audit_rows` of its record, or it was changed."""
        return self._select("SELECT * FROM audits WHERE round = ? ORDER BY place", round_number)

    def strays(self) -> list[int]:
        """Rounds that members or audits are listed for and that are not there."""
        listed = "SELECT round FROM members UNION SELECT round FROM audits"
        return [round_number for (round_number,) in self._select(f"{listed} EXCEPT SELECT round FROM rounds")]

    def check_pages(self) -> None:
        """Have SQLite look for damage in the whole file. Raises :class:`LedgerError` where it finds some."""
        with self._transaction("DEFERRED") as cursor:
            found = str(cursor.execute("PRAGMA integrity_check(1)").fetchone()[0])
            size, there = self._pragma("page_count") * self._pragma("page_size"), self.path.stat().st_size
        if there < size:
            found = f"it was cut off at byte {there:,} of {size:,}"
        if found != "ok":
            raise LedgerError(f"{self.path} is damaged ({' '.join(found.split())}): take another node's copy")

    # --------------------------------------------------------------------------------------- helpers

    def _select(self, query: str, *values: int) -> list[tuple]:  # type: ignore[type-arg]  # as SQLite gives them
        """All rows at once: while a query is open nobody can write."""
        with self._lock, _naming(self.path):
            return self._connection.execute(query, values).fetchall()

    def _entry(self, row: tuple[object, object, object]) -> Entry:
        round_number, certificate, state_root = row
        if not isinstance(round_number, int) or not isinstance(certificate, bytes):
            raise LedgerError(f"{self.path} is damaged: the row of round {round_number} holds no certificate")
        if not (state_root is None or (isinstance(state_root, bytes) and len(state_root) == 32)):
            raise LedgerError(f"{self.path} is damaged: the state_root of round {round_number} is none")
        return Entry(round_number, certificate, state_root)

    def _check_kind(self) -> None:
        application = self._pragma("application_id")
        if application != APPLICATION:
            raise LedgerError(f"{self.path} is no ledger of psyche: give another path, or move it away")
        if (version := self._pragma("user_version")) != VERSION:
            raise LedgerError(
                f"{self.path} is a ledger of format {version}, and this psyche reads {VERSION}: use the version of "
                "psyche that wrote it, or move it away"
            )

    def _pragma(self, name: str) -> int:
        return int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[sqlite3.Cursor]:
        """All of the block or nothing, on disk when it is left; ``DEFERRED`` only reads."""
        with self._lock, _naming(self.path):
            cursor = self._connection.cursor()
            cursor.execute(f"BEGIN {kind}")
            try:
                yield cursor
                cursor.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    cursor.execute("ROLLBACK")
                raise


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False)


def _is_blank(cursor: sqlite3.Cursor) -> bool:
    """Whether the file holds nothing yet: it is new, or its maker was killed before the first transaction was done."""
    return not any(
        cursor.execute(query).fetchone()[0]
        for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )


def _hash_at(cursor: sqlite3.Cursor, round_number: int) -> bytes | None:
    found = cursor.execute("SELECT record_hash FROM rounds WHERE round = ?", (round_number,)).fetchone()
    if found is None:
        return None
    if not isinstance(found[0], bytes):
        raise sqlite3.DatabaseError(f"the record hash of round {round_number} is none")
    return found[0]


@contextlib.contextmanager
def _closing_on_error(ledger: Ledger) -> Iterator[None]:
    try:
        yield
    except BaseException:
        ledger.close()
        raise


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """SQLite's errors, and the disk's, as sentences with a mend."""
    try:
        yield
    except sqlite3.OperationalError as error:
        mend = "free some space" if "full" in str(error) else "check its permissions and that nothing holds it open"
        raise LedgerError(f"cannot use the ledger {path} ({error}): {mend}") from None
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the second of a schema that is no text any more
        raise LedgerError(
            f"{path} is damaged or no ledger ({error}): move it away, or take another node's copy"
        ) from None
    except OSError as error:
        raise LedgerError(f"cannot use the ledger {path} ({error.strerror}): choose another --directory") from None
