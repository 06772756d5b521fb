"""What a ledger records about its rounds and members, as plain values for tables and JSON. No signature is verified."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from psyche.ledger.schema import member_rows
from psyche.ledger.store import Ledger, LedgerError
from psyche.protocol.audit_messages import Verdict
from psyche.protocol.chain import Entry, claimed
from psyche.protocol.messages import Record
from psyche.protocol.wire import MalformedMessage, decode, decode_envelope


class MemberReport(msgspec.Struct):
    """One member in one round. The counts are None if its contribution was excluded."""

    node: str
    votes: int
    tokens: int | None
    inner_steps: int | None
    payload_bytes: int | None
    private: bool
    """Trained on private data, which cannot be audited."""
    reason: str | None
    """Code of the exclusion."""
    dissenter: bool
    """As a reducer it reported another result than the accepted one."""


class AuditorFinding(msgspec.Struct):
    """A finding signed by an auditor."""

    auditor: str
    recorded: int
    """Round whose record contains it."""
    outcome: str
    error: float
    """Relative error of the replay."""
    segment: int
    """Number of the segment with the largest error."""


class ClosedAudit(msgspec.Struct):
    """An audit that closed in a round."""

    accused: str
    audited_round: int
    """Round of the contribution."""
    outcome: str
    gain: float
    """Reduction of the held-out loss, in nats a token."""
    paid_auditors: list[str]
    false_auditors: list[str]
    """Auditors convicted for a false finding."""
    findings: list[AuditorFinding]


class LedgerRound(msgspec.Struct):
    """One certified round. Hashes are hexadecimal."""

    round: int
    record: str
    state_root: str | None
    """The state root after the round; None if it is not known here."""
    is_reconfiguration: bool
    members: list[MemberReport]
    audits: list[ClosedAudit]


class NodeTotal(msgspec.Struct):
    """A node's sums over all rounds in the ledger."""

    rounds: int = 0
    """Rounds that it was a member of."""
    accepted: int = 0
    """Rounds in which its contribution was accepted."""
    tokens: int = 0
    unaudited: int = 0
    """Tokens of private data among ``tokens``."""
    payload_bytes: int = 0


class LedgerReport(msgspec.Struct):
    """The output of ``psyche ledger show``."""

    run_id: str
    rounds: list[LedgerRound]
    held: int
    """Rounds in the ledger, whether listed in ``rounds`` or not."""
    missing: list[tuple[int, int]]
    """First and last round of each gap."""
    superseded: list[int]
    """Rounds for which an earlier certified record was superseded."""
    totals: dict[str, NodeTotal]


def ledger_report(ledger: Ledger, *, last: int | None = None, node: str | None = None) -> LedgerReport:
    """Report the ``last`` rounds or all, and totals over all rounds.

    With ``node``, the end of a PeerID, report only that member. Raises :class:`LedgerError` if a certificate cannot be
    decoded, or if ``node`` does not match exactly one member.
    """
    totals: dict[str, NodeTotal] = {}
    rounds: deque[LedgerRound] = deque(maxlen=None if node is not None else last)
    findings: dict[tuple[str, int], list[AuditorFinding]] = {}
    held = 0
    for entry in ledger.entries():
        held += 1
        ledger_round = _round(entry, decode_record(ledger, entry), findings)
        _add(totals, ledger_round)
        rounds.append(ledger_round)
    shown = list(rounds)
    if node is not None:
        matched = match_node(ledger, totals, node)
        totals = {matched: totals[matched]}
        shown = [one for one in (_only_node(each, matched) for each in rounds) if one.members or one.audits]
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
    """Decode the record of an entry of ``ledger``. Raises :class:`LedgerError`."""
    try:
        return claimed(entry.certificate).record
    except MalformedMessage as error:
        raise LedgerError(
            f"{ledger.path} is damaged: the certificate of round {entry.round} is {error}; copy another node's ledger"
        ) from None


def match_node(ledger: Ledger, nodes: Iterable[str], suffix: str) -> str:
    """Return the one of ``nodes`` that ends in ``suffix``. Raises :class:`LedgerError` if there is none or several."""
    found = [node for node in nodes if node.endswith(suffix.removeprefix("…"))]
    if len(found) == 1:
        return found[0]
    if found:
        raise LedgerError(f"{len(found)} members in {ledger.path} have a PeerID that ends in {suffix}: give more of it")
    raise LedgerError(
        f"no member in {ledger.path} has a PeerID that ends in {suffix}: `psyche ledger show` lists the members"
    )


def _round(entry: Entry, record: Record, findings: dict[tuple[str, int], list[AuditorFinding]]) -> LedgerRound:
    """Report one round. ``findings`` collects those of open audits, by accused and round."""
    members = [
        MemberReport(node, votes, tokens, steps, payload_bytes, bool(private), reason, bool(dissenter))
        for _, node, votes, _, tokens, steps, payload_bytes, private, reason, dissenter, _ in member_rows(record)
    ]
    root = None if entry.state_root is None else entry.state_root.hex()
    for statement in record.audit_state.statements:
        _add_finding(statement, entry.round, findings)
    audits = [
        ClosedAudit(
            accused=one.accused,
            audited_round=one.round,
            outcome=one.outcome,
            gain=one.gain / 1e6,
            paid_auditors=list(one.paid),
            false_auditors=list(one.lied),
            findings=findings.pop((one.accused, one.round), []),
        )
        for one in record.audit_state.closed
    ]
    return LedgerRound(entry.round, record.hash.hex(), root, record.is_reconfiguration, members, audits)


def _add_finding(statement: bytes, round_number: int, findings: dict[tuple[str, int], list[AuditorFinding]]) -> None:
    """Add the finding of a revealed verdict. Sealed verdicts and undecodable statements are skipped."""
    try:
        envelope = decode_envelope(statement)
        if envelope.domain != Verdict.DOMAIN:
            return
        verdict = decode(Verdict, envelope.body)
    except MalformedMessage:
        return
    found = verdict.finding
    finding = AuditorFinding(envelope.author, round_number, found.outcome, found.error / 1e6, found.segment)
    findings.setdefault((verdict.accused, verdict.round), []).append(finding)


def _add(totals: dict[str, NodeTotal], ledger_round: LedgerRound) -> None:
    for member in ledger_round.members:
        total = totals.setdefault(member.node, NodeTotal())
        total.rounds += 1
        if member.tokens is not None:
            total.accepted += 1
            total.tokens += member.tokens
            total.unaudited += member.tokens * member.private
            total.payload_bytes += member.payload_bytes or 0


def _only_node(ledger_round: LedgerRound, node: str) -> LedgerRound:
    members = [member for member in ledger_round.members if member.node == node]
    audits = [one for one in ledger_round.audits if node in (one.accused, *one.paid_auditors, *one.false_auditors)]
    return msgspec.structs.replace(ledger_round, members=members, audits=audits)
