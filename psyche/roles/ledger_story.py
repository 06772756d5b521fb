"""What a ledger tells its reader, as plain values: for a table, or as JSON."""

from __future__ import annotations

from collections import deque

import msgspec

from psyche.protocol.envelope import MalformedMessage
from psyche.protocol.ledger import Entry, claimed
from psyche.protocol.messages import Record
from psyche.state.ledger import Ledger, LedgerError
from psyche.state.ledger_schema import member_rows


class Part(msgspec.Struct):
    """A member's part in a round. ``tokens`` and what goes with it are None where it was left out."""

    node: str
    votes: int
    tokens: int | None
    inner_steps: int | None
    payload_bytes: int | None
    private: bool
    """Trained on data of its own, which nobody can audit."""
    reason: str | None
    minority: bool


class Round(msgspec.Struct):
    """One certified round. Hashes are hexadecimal."""

    round: int
    record: str
    state_root: str | None
    """After the round."""
    reconfiguration: bool
    members: list[Part]


class Total(msgspec.Struct):
    """What a node has done in all rounds that are there."""

    rounds: int = 0
    """That it was a member of."""
    accepted: int = 0
    """Rounds that took its contribution."""
    tokens: int = 0
    unaudited: int = 0
    """Those among the tokens that were private data."""
    payload_bytes: int = 0


class Story(msgspec.Struct):
    """All that ``psyche ledger show`` shows."""

    run_id: str
    rounds: list[Round]
    held: int
    """Rounds that are there, shown or not."""
    missing: list[tuple[int, int]]
    """First and last round of each gap."""
    superseded: list[int]
    """Rounds of which another record was certified before."""
    totals: dict[str, Total]


def story_of(ledger: Ledger, *, last: int | None = None, node: str | None = None) -> Story:
    """What ``ledger`` says: its ``last`` rounds or all, and totals over all; of the member whose PeerID ends in
    ``node``, or of all.

    Its certificates are decoded and not checked. Raises :class:`LedgerError` for what cannot be decoded, and where
    ``node`` is not exactly one member.
    """
    totals: dict[str, Total] = {}
    rounds: deque[Round] = deque(maxlen=None if node is not None else last)
    held = 0
    for entry in ledger.entries():
        held += 1
        round = _round(entry, _record(ledger, entry))
        _add(totals, round)
        rounds.append(round)
    shown = list(rounds)
    if node is not None:
        me = _only(ledger, totals, node)
        totals = {me: totals[me]}
        shown = [_part_of(round, me) for round in rounds if any(part.node == me for part in round.members)]
        shown = shown[-last:] if last is not None else shown
    return Story(
        run_id=ledger.run_id.hex(),
        rounds=shown,
        held=held,
        missing=[(gap.start, gap.stop - 1) for gap in ledger.missing()],
        superseded=[entry.round for entry in ledger.superseded()],
        totals=dict(sorted(totals.items(), key=lambda item: (-item[1].tokens, item[0]))),
    )


def _record(ledger: Ledger, entry: Entry) -> Record:
    try:
        return claimed(entry.certificate).record
    except MalformedMessage as error:
        raise LedgerError(
            f"{ledger.path} is damaged: the certificate of round {entry.round} is {error}; take another node's copy"
        ) from None


def _round(entry: Entry, record: Record) -> Round:
    members = [
        Part(node, votes, tokens, steps, payload_bytes, bool(private), reason, bool(minority))
        for _, node, votes, _, tokens, steps, payload_bytes, private, reason, minority, _ in member_rows(record)
    ]
    root = None if entry.state_root is None else entry.state_root.hex()
    return Round(entry.round, record.hash.hex(), root, record.reconfiguration, members)


def _add(totals: dict[str, Total], round: Round) -> None:
    for part in round.members:
        total = totals.setdefault(part.node, Total())
        total.rounds += 1
        if part.tokens is not None:
            total.accepted += 1
            total.tokens += part.tokens
            total.unaudited += part.tokens * part.private
            total.payload_bytes += part.payload_bytes or 0


def _only(ledger: Ledger, totals: dict[str, Total], node: str) -> str:
    found = [name for name in totals if name.endswith(node.removeprefix("…"))]
    if len(found) == 1:
        return found[0]
    what = "no member" if not found else f"{len(found)} members"
    mend = "look at `psyche ledger show` for who is in it" if not found else "give more of it"
    raise LedgerError(f"the PeerID of {what} in {ledger.path} ends in {node}: {mend}")


def _part_of(round: Round, node: str) -> Round:
    return msgspec.structs.replace(round, members=[part for part in round.members if part.node == node])
