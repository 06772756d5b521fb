"""What a ledger tells its reader, as plain values: for a table, or as JSON."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from psyche.ledger.schema import member_rows
from psyche.ledger.store import Ledger, LedgerError
from psyche.protocol import envelope as envelopes
from psyche.protocol.envelope import MalformedMessage
from psyche.protocol.ledger import Entry, claimed
from psyche.protocol.messages import Record
from psyche.protocol.verdicts import Verdict
from psyche.protocol.wire import decode


class MemberReport(msgspec.Struct):
    """A member's part in a round. ``tokens`` and what goes with it are None where it was left out."""

    node: str
    votes: int
    tokens: int | None
    inner_steps: int | None
    payload_bytes: int | None
    private: bool
    """Trained on data of its own, which nobody can audit."""
    reason: str | None
    dissenters: bool


class AuditorFinding(msgspec.Struct):
    """What an auditor found, signed by it: the evidence."""

    auditor: str
    said: int
    """Round whose record holds it."""
    outcome: str
    error: float
    """Of the replay, relative."""
    segment: int


class ClosedAudit(msgspec.Struct):
    """An audit that ended with a round."""

    accused: str
    work: int
    """Round of the contribution."""
    outcome: str
    gain: float
    """Of held-out loss, nats a token."""
    paid: list[str]
    lied: list[str]
    evidence: list[AuditorFinding]


class LedgerRound(msgspec.Struct):
    """One certified round. Hashes are hexadecimal."""

    round: int
    record: str
    state_root: str | None
    """After the round."""
    is_reconfiguration: bool
    members: list[MemberReport]
    audits: list[ClosedAudit]


class NodeTotal(msgspec.Struct):
    """What a node has done in all rounds that are there."""

    rounds: int = 0
    """That it was a member of."""
    accepted: int = 0
    """Rounds that took its contribution."""
    tokens: int = 0
    unaudited: int = 0
    """Those among the tokens that were private data."""
    payload_bytes: int = 0


class LedgerReport(msgspec.Struct):
    """All that ``psyche ledger show`` shows."""

    run_id: str
    rounds: list[LedgerRound]
    held: int
    """Rounds that are there, shown or not."""
    missing: list[tuple[int, int]]
    """First and last round of each gap."""
    superseded: list[int]
    """Rounds of which another record was certified before."""
    totals: dict[str, NodeTotal]


def ledger_report(ledger: Ledger, *, last: int | None = None, node: str | None = None) -> LedgerReport:
    """What ``ledger`` says: its ``last`` rounds or all, and totals over all; of the member whose PeerID ends in
    ``node``, or of all.

    Its certificates are decoded and not checked. Raises :class:`LedgerError` for what cannot be decoded, and where
    ``node`` is not exactly one member.
    """
    totals: dict[str, NodeTotal] = {}
    rounds: deque[LedgerRound] = deque(maxlen=None if node is not None else last)
    words: dict[tuple[str, int], list[AuditorFinding]] = {}
    held = 0
    for entry in ledger.entries():
        held += 1
        ledger_round = _round(entry, decode_record(ledger, entry), words)
        _add(totals, ledger_round)
        rounds.append(ledger_round)
    shown = list(rounds)
    if node is not None:
        me = match_node(ledger, totals, node)
        totals = {me: totals[me]}
        shown = [
            ledger_round
            for ledger_round in (_part_of(one, me) for one in rounds)
            if ledger_round.members or ledger_round.audits
        ]
        shown = shown[-last:] if last is not None else shown
    return LedgerReport(
        run_id=ledger.run_id.hex(),
        rounds=shown,
        held=held,
        missing=[(gap.start, gap.stop - 1) for gap in ledger.missing()],
        superseded=[entry.round for entry in ledger.superseded()],
        totals=dict(sorted(totals.items(), key=lambda item: (-item[1].tokens, item[0]))),
    )


def decode_record(ledger: Ledger, entry: Entry) -> Record:
    """What an entry of ``ledger`` says, no signature checked. Raises :class:`LedgerError`."""
    try:
        return claimed(entry.certificate).record
    except MalformedMessage as error:
        raise LedgerError(
            f"{ledger.path} is damaged: the certificate of round {entry.round} is {error}; take another node's copy"
        ) from None


def _round(entry: Entry, record: Record, words: dict[tuple[str, int], list[AuditorFinding]]) -> LedgerRound:
    """``words``: of audits that are open, what was said so far."""
    members = [
        MemberReport(node, votes, tokens, steps, payload_bytes, bool(private), reason, bool(dissenters))
        for _, node, votes, _, tokens, steps, payload_bytes, private, reason, dissenters, _ in member_rows(record)
    ]
    root = None if entry.state_root is None else entry.state_root.hex()
    for said in record.audit_state.statements:
        _hear(said, entry.round, words)
    audits = [
        ClosedAudit(
            accused=one.accused,
            work=one.round,
            outcome=one.outcome,
            gain=one.gain / 1e6,
            paid=list(one.paid),
            lied=list(one.lied),
            evidence=words.pop((one.accused, one.round), []),
        )
        for one in record.audit_state.closed
    ]
    return LedgerRound(entry.round, record.hash.hex(), root, record.is_reconfiguration, members, audits)


def _hear(said: bytes, round_number: int, words: dict[tuple[str, int], list[AuditorFinding]]) -> None:
    """Add a verdict to what was said; digests of verdicts say nothing, and neither does what cannot be read."""
    try:
        envelope = envelopes.decode(said)
        if envelope.domain != Verdict.DOMAIN:
            return
        verdict = decode(Verdict, envelope.body)
    except MalformedMessage:
        return
    found = verdict.finding
    word = AuditorFinding(envelope.author, round_number, found.outcome, found.error / 1e6, found.segment)
    words.setdefault((verdict.accused, verdict.round), []).append(word)


def _add(totals: dict[str, NodeTotal], ledger_round: LedgerRound) -> None:
    for part in ledger_round.members:
        total = totals.setdefault(part.node, NodeTotal())
        total.rounds += 1
        if part.tokens is not None:
            total.accepted += 1
            total.tokens += part.tokens
            total.unaudited += part.tokens * part.private
            total.payload_bytes += part.payload_bytes or 0


def match_node(ledger: Ledger, names: Iterable[str], node: str) -> str:
    """The one of ``names`` that ends in ``node``. Raises :class:`LedgerError` where it is none or several."""
    found = [name for name in names if name.endswith(node.removeprefix("…"))]
    if len(found) == 1:
        return found[0]
    what = "no member" if not found else f"{len(found)} members"
    mend = "look at `psyche ledger show` for who is in it" if not found else "give more of it"
    raise LedgerError(f"the PeerID of {what} in {ledger.path} ends in {node}: {mend}")


def _part_of(ledger_round: LedgerRound, node: str) -> LedgerRound:
    members = [part for part in ledger_round.members if part.node == node]
    audits = [one for one in ledger_round.audits if node in (one.accused, *one.paid, *one.lied)]
    return msgspec.structs.replace(ledger_round, members=members, audits=audits)
