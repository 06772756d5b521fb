"""The ledger: the certified chain of a run in one SQLite file, on every node and coordinator.

Each round is one row of ``rounds``. Its certificate is the proof; the other columns and tables are derived from it for
use in SQL, and ``psyche ledger verify`` checks that they match. Records that the run abandoned are kept in
``superseded`` as evidence.
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
from psyche.protocol.chain import Entry, claimed, missing_rounds
from psyche.protocol.messages import Record

NAME = "ledger.sqlite"
_WAIT_SECONDS = 30.0
"""Time to wait for another process that has locked the file."""
_PAGE = 64
"""Rounds per query."""


class LedgerError(PsycheError):
    """A ledger file cannot be used. The message says why and what to do."""


class Forked(LedgerError):
    """Two certified records claim the same round."""


class Ledger:
    """One node's ledger file. Thread-safe. Every method raises :class:`LedgerError` on a bad file."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        """Use :meth:`open` or :meth:`read`."""
        self.path = path
        self._connection = connection
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, run_id: bytes) -> Self:
        """Open the ledger of run ``run_id`` at ``path`` for writing, and create it if needed."""
        with _naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            ledger = cls(path, _connect(path, "rwc"))
        with _closing_on_error(ledger), _naming(path):
            # EXTRA also flushes the directory after the journal is deleted: a committed round survives a power loss.
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
                    "or move the file away"
                )
        return ledger

    @classmethod
    def read(cls, path: Path) -> Self:
        """Open a ledger of any run for reading."""
        if not path.is_file():
            raise LedgerError(
                f"there is no ledger at {path}: give the directory of a node or coordinator, or a ledger file"
            )
        with _naming(path):
            # SQLite rolls back a killed process's transaction on the next open, which needs write access.
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
        """Close the file. The ledger is unusable afterwards."""
        with self._lock:
            self._connection.close()

    # --------------------------------------------------------------------------------------- writing

    def append(self, certificate: bytes, record: Record, state_root: bytes | None) -> None:
        """Insert a certified round durably. Rounds before and after it may be missing.

        ``certificate`` proves ``record`` and must have been verified. ``state_root`` is this node's state after the
        round, or None. Inserting the same record again changes only the state root: the base root of the next round
        takes precedence, then the latest value. Raises :class:`Forked` and changes nothing if another record has that
        round, or if the neighbouring rounds are not linked to this one by their hashes.
        """
        with self._transaction() as cursor:
            self._append(cursor, certificate, record, state_root)

    def supersede(self, certificate: bytes, record: Record, state_root: bytes | None) -> int:
        """Insert a certified round like :meth:`append`, moving contradicting records to ``superseded``.

        Those are the record of that round, all later ones, and the one before if it is not the one built on. They prove
        that the run went back. Returns the number of records moved.
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
            raise ValueError("the certificate belongs to another record")
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
        # The base root is certified by a quorum: a node that computed another state was wrong.
        cursor.execute("UPDATE rounds SET state_root = ? WHERE round = ?", (base_root, round_number - 1))

    def _forked(self, round_number: int, there: bytes | None, other: bytes) -> Forked:
        name = there.hex()[:12] if there else "none"
        return Forked(
            f"round {round_number} was certified twice: {self.path} holds record {name}, and {other.hex()[:12]} claims "
            "the same round; keep this file as proof"
            if round_number
            else f"round 1 belongs to run {other.hex()[:12]}, but {self.path} is the ledger of run {name}"
        )

    # --------------------------------------------------------------------------------------- reading

    @property
    def run_id(self) -> bytes:
        """The id of the run."""
        with self._lock, _naming(self.path):
            rows = self._connection.execute("SELECT run_id FROM run LIMIT 2").fetchall()
        if len(rows) != 1 or not isinstance(rows[0][0], bytes):
            raise LedgerError(f"{self.path} has no valid run id: move it away")
        return rows[0][0]

    def rounds(self) -> list[int]:
        """Return the rounds in the ledger, ascending."""
        return [round_number for (round_number,) in self._select("SELECT round FROM rounds ORDER BY round")]

    def missing(self) -> tuple[range, ...]:
        """Return the gaps: rounds before the last one that are not in the ledger."""
        return missing_rounds(self.rounds())

    def hash_of(self, round_number: int) -> bytes | None:
        """Return the record hash of a round, or None."""
        with self._lock, _naming(self.path):
            return _hash_at(self._connection.cursor(), round_number)

    def entries(self, first: int = 1) -> Iterator[Entry]:
        """Yield the rounds from ``first`` on, ascending. Nothing in them is verified."""
        query = "SELECT round, certificate, state_root FROM rounds WHERE round >= ? ORDER BY round LIMIT ?"
        while page := [self._entry(row) for row in self._select(query, first, _PAGE)]:
            yield from page
            first = page[-1].round + 1

    def entry(self, round_number: int) -> Entry | None:
        """Return a round, or None. Nothing in it is verified."""
        query = "SELECT round, certificate, state_root FROM rounds WHERE round = ?"
        return next((self._entry(row) for row in self._select(query, round_number)), None)

    def superseded(self) -> list[Entry]:
        """Return the superseded records, by round."""
        query = "SELECT round, certificate, state_root FROM superseded ORDER BY round, record_hash"
        return [self._entry(row) for row in self._select(query)]

    def row(self, round_number: int) -> RoundRow | None:
        """Return the stored row of a round, to compare with :func:`round_row` of its record."""
        query = "SELECT round, record_hash, previous, base_root, reconfiguration FROM rounds WHERE round = ?"
        return next(iter(self._select(query, round_number)), None)

    def member_rows(self, round_number: int) -> list[MemberRow]:
        """Return the stored rows of a round's members, to compare with :func:`member_rows` of its record."""
        return self._select("SELECT * FROM members WHERE round = ? ORDER BY node", round_number)

    def audit_rows(self, round_number: int) -> list[AuditRow]:
        """Return the stored rows of a round's closed audits, to compare with :func:`audit_rows` of its record."""
        return self._select("SELECT * FROM audits WHERE round = ? ORDER BY position", round_number)

    def strays(self) -> list[int]:
        """Return rounds that have members or audits but no row in ``rounds``."""
        listed = "SELECT round FROM members UNION SELECT round FROM audits"
        return [round_number for (round_number,) in self._select(f"{listed} EXCEPT SELECT round FROM rounds")]

    def check_pages(self) -> None:
        """Run SQLite's integrity check on the whole file. Raises :class:`LedgerError` if it finds damage."""
        with self._transaction("DEFERRED") as cursor:
            found = str(cursor.execute("PRAGMA integrity_check(1)").fetchone()[0])
            size, there = self._pragma("page_count") * self._pragma("page_size"), self.path.stat().st_size
        if there < size:
            found = f"it is truncated at byte {there:,} of {size:,}"
        if found != "ok":
            raise LedgerError(f"{self.path} is damaged ({' '.join(found.split())}): copy another node's ledger")

    # --------------------------------------------------------------------------------------- helpers

    def _select(self, query: str, *values: int) -> list[tuple]:  # type: ignore[type-arg]  # as SQLite gives them
        """Return all rows at once: an open query would block writers."""
        with self._lock, _naming(self.path):
            return self._connection.execute(query, values).fetchall()

    def _entry(self, row: tuple[object, object, object]) -> Entry:
        round_number, certificate, state_root = row
        if not isinstance(round_number, int) or not isinstance(certificate, bytes):
            raise LedgerError(f"{self.path} is damaged: round {round_number} has no certificate")
        if not (state_root is None or (isinstance(state_root, bytes) and len(state_root) == 32)):
            raise LedgerError(f"{self.path} is damaged: the state root of round {round_number} is not a hash")
        return Entry(round_number, certificate, state_root)

    def _check_kind(self) -> None:
        application = self._pragma("application_id")
        if application != APPLICATION:
            raise LedgerError(f"{self.path} is not a psyche ledger: give another path, or move the file away")
        if (version := self._pragma("user_version")) != VERSION:
            raise LedgerError(
                f"{self.path} is a ledger of format {version}, and this psyche reads {VERSION}: use the version of "
                "psyche that wrote it, or move it away"
            )

    def _pragma(self, name: str) -> int:
        return int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[sqlite3.Cursor]:
        """Run the block as one durable transaction; ``DEFERRED`` only reads."""
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
    """Return whether the file is empty: new, or its creator was killed before the first transaction was committed."""
    return not any(
        cursor.execute(query).fetchone()[0]
        for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )


def _hash_at(cursor: sqlite3.Cursor, round_number: int) -> bytes | None:
    found = cursor.execute("SELECT record_hash FROM rounds WHERE round = ?", (round_number,)).fetchone()
    if found is None:
        return None
    if not isinstance(found[0], bytes):
        raise sqlite3.DatabaseError(f"the record hash of round {round_number} is not a hash")
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
    """Turn errors of SQLite and the disk into :class:`LedgerError`, with what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        fix = "free disk space" if "full" in str(error) else "check its permissions and that nothing holds it open"
        raise LedgerError(f"cannot use the ledger {path} ({error}): {fix}") from None
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the second if the schema is damaged
        raise LedgerError(
            f"{path} is damaged or not a ledger ({error}): move it away, or copy another node's ledger"
        ) from None
    except OSError as error:
        raise LedgerError(f"cannot use the ledger {path} ({error.strerror}): choose another --directory") from None
