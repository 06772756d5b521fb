"""The tables of a ledger file, and what they say of a record."""

from __future__ import annotations

from psyche.protocol.messages import Record

VERSION = 3
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
    reason TEXT,                   -- excluded: code of protocol ExclusionReason
    minority INTEGER NOT NULL,     -- it reported another result than the one believed
    payout BLOB,                   -- address that it wants to be paid at; empty: it named none
    PRIMARY KEY (round, node)
) WITHOUT ROWID;
CREATE TABLE audits (              -- those that ended
    round INTEGER NOT NULL,        -- whose record says so
    place INTEGER NOT NULL,        -- in that record
    accused TEXT NOT NULL,
    work INTEGER NOT NULL,         -- round of the contribution that was done again
    outcome TEXT NOT NULL,
    gain INTEGER NOT NULL,         -- of held-out loss, in millionths of a nat a token
    paid TEXT NOT NULL,            -- auditors whose word agrees with it, with spaces between them
    lied TEXT NOT NULL,            -- and those who said the opposite
    PRIMARY KEY (round, place)
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

MemberRow = tuple[int, str, int, int, int | None, int | None, int | None, int | None, str | None, int, bytes | None]
"""A row of ``members``."""
AuditRow = tuple[int, int, str, int, str, int, str, str]
"""A row of ``audits``."""
RoundRow = tuple[int, bytes, bytes, bytes, int]
"""Of a row of ``rounds`` what its certificate says: round, record_hash, previous, base_root, reconfiguration."""


def round_row(record: Record) -> RoundRow:
    """What ``rounds`` says of a record."""
    plan = record.plan
    return plan.round, record.hash, plan.previous, plan.base_root, int(record.is_reconfiguration)


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
        rest = reasons.get(node), int(node in record.dissenters), None if done is None else done.payout
        rows.append((record.plan.round, node, member.votes, member.inner_steps, *counts, *rest))
    return rows


def audit_rows(record: Record) -> list[AuditRow]:
    """What ``audits`` says of a record, in its order."""
    return [
        (
            record.plan.round,
            place,
            one.accused,
            one.round,
            one.outcome,
            one.gain,
            " ".join(one.paid),
            " ".join(one.lied),
        )
        for place, one in enumerate(record.audit_state.closed)
    ]
