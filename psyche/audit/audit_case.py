"""What a node's own ledger says of a contribution that is to be done again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from psyche.protocol.audits import seed_of
from psyche.protocol.messages import Contribution, Plan, Record

LOOKBACK = 64
"""Rounds in which a node's error feedback is looked for: one that started again goes on with that of a checkpoint."""


@dataclass(frozen=True)
class AuditCase:
    """A contribution, and what records say that it has to follow from."""

    plan: Plan
    node: str
    given: Contribution
    before: Plan | None
    """Of the round before, whose data late steps took; without it those are not checked."""
    seed: bytes
    residuals: frozenset[bytes] | None
    """This and ``seed``: see ``audit/replay.py: Claim``."""
    jury: bool = False
    """Auditors do not agree about it: look closely."""


def first_needed(round_number: int) -> int:
    """Rounds from this one on up to the audited one are what :func:`open_case` wants."""
    return max(1, round_number - LOOKBACK)


def open_case(
    node: str, round_number: int, records: Mapping[int, Record], run_id: bytes, fragments: int, *, jury: bool = False
) -> AuditCase | None:
    """The case of what ``node`` contributed to ``round``, from the records there are; None where it is in none."""
    record = records.get(round_number)
    if record is None:
        return None
    given = next((one.contribution for one in record.accepted if one.node == node), None)
    if given is None:
        return None
    before = records.get(round_number - 1)
    residuals = _residuals(node, round_number, records, fragments)
    seed = seed_of(record.plan, record.accepted, run_id)
    return AuditCase(record.plan, node, given, before.plan if before else None, seed, residuals, jury)


def _residuals(node: str, audited: int, records: Mapping[int, Record], fragments: int) -> frozenset[bytes] | None:
    """What the error feedback of the fragment may have been before the round, as far as records say.

    None where they do not: something of the node's was left out, and given back to its error feedback, or it has been
    there for longer than the records at hand.
    """
    found: set[bytes] = set()
    for round_number in range(audited - fragments, first_needed(audited) - 1, -fragments):
        record = records.get(round_number)
        if record is None or any(one.node == node for one in record.excluded):
            return None
        found |= {one.contribution.residual_out for one in record.accepted if one.node == node}
    return frozenset(found) if found or first_needed(audited) == 1 else None
