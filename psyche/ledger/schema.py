"""The tables of a ledger file, and the rows that follow from a record."""

from __future__ import annotations

from psyche.protocol.messages import Record

VERSION = 4
APPLICATION = int.from_bytes(b"psyc", "big")
"""Stored in the header of the SQLite file, like ``VERSION``."""

_TABLES = """
CREATE TABLE run (run_id BLOB NOT NULL);
CREATE TABLE rounds (
    round INTEGER PRIMARY KEY,
    record_hash BLOB NOT NULL,
    previous BLOB NOT NULL,        -- hash of the record of the round before
    base_root BLOB NOT NULL,       -- state_root before the round
    state_root BLOB,               -- state_root after the round; NULL: not known here
    reconfiguration INTEGER NOT NULL,
    certificate BLOB NOT NULL      -- encoded; proves the row
);
CREATE TABLE members (
    round INTEGER NOT NULL,
    node TEXT NOT NULL,
    votes INTEGER NOT NULL,           -- voting weight
    quota_steps INTEGER NOT NULL,     -- inner steps assigned by the plan
    tokens INTEGER,                   -- tokens credited; NULL: the contribution was excluded
    inner_steps INTEGER,
    payload_bytes INTEGER,
    private INTEGER,                  -- trained on private data: not auditable, weight capped
    reason TEXT,                      -- excluded: code of protocol ExclusionReason
    dissenter INTEGER NOT NULL,       -- as a reducer, reported another result than the accepted one
    payout BLOB,                      -- payout address; empty: none named
    PRIMARY KEY (round, node)
) WITHOUT ROWID;
CREATE TABLE audits (                 -- closed audits
    round INTEGER NOT NULL,           -- round whose record closes the audit
    position INTEGER NOT NULL,        -- order within that record
    accused TEXT NOT NULL,
    audited_round INTEGER NOT NULL,   -- round of the audited contribution
    outcome TEXT NOT NULL,
    gain INTEGER NOT NULL,            -- reduction of the held-out loss, in 1e-6 nats a token
    paid_auditors TEXT NOT NULL,      -- auditors whose finding agrees with the outcome, separated by spaces
    false_auditors TEXT NOT NULL,     -- auditors convicted for a false finding
    PRIMARY KEY (round, position)
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
"""The statements that create an empty ledger, in one transaction."""

MemberRow = tuple[int, str, int, int, int | None, int | None, int | None, int | None, str | None, int, bytes | None]
"""A row of ``members``."""
AuditRow = tuple[int, int, str, int, str, int, str, str]
"""A row of ``audits``."""
RoundRow = tuple[int, bytes, bytes, bytes, int]
"""Columns of ``rounds`` that follow from the certificate: round, record_hash, previous, base_root, reconfiguration."""


def round_row(record: Record) -> RoundRow:
    """Return the row of ``rounds`` for a record."""
    plan = record.plan
    return plan.round, record.hash, plan.previous, plan.base_root, int(record.is_reconfiguration)


def member_rows(record: Record) -> list[MemberRow]:
    """Return the rows of ``members`` for a record, ascending by node."""
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
    """Return the rows of ``audits`` for a record, in its order."""
    return [
        (
            record.plan.round,
            position,
            one.accused,
            one.round,
            one.outcome,
            one.gain,
            " ".join(one.paid),
            " ".join(one.lied),
        )
        for position, one in enumerate(record.audit_state.closed)
    ]
