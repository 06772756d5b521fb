"""The tables of a ledger file, and what they say of a record."""

from __future__ import annotations

from psyche.protocol.messages import Record

VERSION = 2
APPLICATION = int.from_bytes(b"psyc", "big")
"""SQLite keeps both in the file's header."""

_TABLES = """
CREATE TABLE run (run_id BLOB NOT NULL);
CREATE TABLE rounds (
    round INTEGER PRIMARY KEY,
    record_hash BLOB NOT NULL,
    previous BLOB NOT NULL,        -- hash of the record before
    base_root BLOB NOT NULL,       -- state_root before the round
    state_root BLOB,               -- after it; NULL: not known here
    reconfiguration INTEGER NOT NULL,
    certificate BLOB NOT NULL      -- the proof
);
CREATE TABLE members (
    round INTEGER NOT NULL,
    node TEXT NOT NULL,
    votes INTEGER NOT NULL,        -- voting weight
    due_steps INTEGER NOT NULL,    -- inner steps the plan gave it
    tokens INTEGER,                -- accepted: what it counts for; NULL: not accepted
    inner_steps INTEGER,
    payload_bytes INTEGER,
    private INTEGER,               -- trained on data of its own: unaudited, its weight capped
    reason TEXT,                   -- left out: why
    minority INTEGER NOT NULL,     -- it reported another result than the one believed
    PRIMARY KEY (round, node)
) WITHOUT ROWID;
CREATE TABLE superseded (
    record_hash BLOB PRIMARY KEY,
    round INTEGER NOT NULL,
    state_root BLOB,
    certificate BLOB NOT NULL
);
"""

SCHEMA = (
    *filter(str.strip, _TABLES.split(";\n")),
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
)
"""The statements that make an empty ledger, in one transaction."""

MemberRow = tuple[int, str, int, int, int | None, int | None, int | None, int | None, str | None, int]
"""A row of ``members``."""
RoundRow = tuple[int, bytes, bytes, bytes, int]
"""Of a row of ``rounds`` what its certificate says: round, record_hash, previous, base_root, reconfiguration."""


def round_row(record: Record) -> RoundRow:
    """What ``rounds`` says of a record."""
    plan = record.plan
    return plan.round, record.hash, plan.previous, plan.base_root, int(record.reconfiguration)


def member_rows(record: Record) -> list[MemberRow]:
    """What ``members`` says of a record, ascending by node."""
    given = {one.node: one.contribution for one in record.accepted}
    reasons = {one.node: one.reason for one in record.excluded}
    rows: list[MemberRow] = []
    for member in sorted(record.plan.members, key=lambda one: one.node):
        node = member.node
        done = given.get(node)
        counts: tuple[int | None, int | None, int | None, int | None] = (None, None, None, None)
        if done is not None:
            counts = done.tokens, done.inner_steps, done.payload_bytes, int(done.private)
        outvoted = int(node in record.minority)
        rows.append((record.plan.round, node, member.votes, member.inner_steps, *counts, reasons.get(node), outvoted))
    return rows
