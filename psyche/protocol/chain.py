"""Whether a chain of certificates is the history of a run: what a ledger proves to somebody who holds only its bytes.

Pure. A ledger may begin late and have gaps, where its node came late or was away: what is there is checked, each
round on its own and against the one before it that is there, and what is not is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from psyche.protocol.acceptor import Chain, plan_fault
from psyche.protocol.assignment import next_position, reducer_order_fault
from psyche.protocol.audit_messages import EMPTY, AuditState
from psyche.protocol.audits import audits_fault
from psyche.protocol.certificates import BadCertificate, Open, certified
from psyche.protocol.contributions import contribution_fault
from psyche.protocol.messages import Certificate, Plan, Proposal, Record, Standing
from psyche.protocol.pacing import quota_fault
from psyche.protocol.round_state import Rules
from psyche.protocol.standing import standing_fault
from psyche.protocol.wire import MalformedMessage, decode, decode_envelope


class BadLedger(ValueError):
    """Why a chain is not the history of the run. ``round`` is the first one at fault, and stands in the message."""

    def __init__(self, round_number: int, reason: str) -> None:
        super().__init__(round_number, reason)  # what another process makes it from again
        self.round, self.reason = round_number, reason

    def __str__(self) -> str:
        return f"round {self.round}: {self.reason}"


@dataclass(frozen=True)
class Entry:
    """A round as a ledger holds it."""

    round: int
    certificate: bytes
    state_root: bytes | None
    """What the ledger says all held after the round; None where its owner did not know. Proven by the round after."""


@dataclass(frozen=True)
class Verified:
    """A round that holds up."""

    record: Record
    missing: range
    """Rounds before it, and after the last one that was given, that the ledger does not have."""

    @property
    def tokens(self) -> Mapping[str, int]:
        """Of each node whose contribution was accepted, the tokens it counts for."""
        return {one.node: one.contribution.tokens for one in self.record.accepted}


def claimed(certificate: bytes) -> Proposal:
    """What a certificate says, with no signature checked. Raises :class:`MalformedMessage`."""
    return decode(Proposal, decode_envelope(decode(Certificate, certificate).proposal).body)


def verify_chain(
    entries: Iterable[Entry],
    *,
    rules: Rules,
    coordinators: Sequence[str],
    open_envelope: Open,
    after: Entry | None = None,
) -> Iterator[Verified]:
    """Each entry, in the order given, once it is proven. Raises :class:`BadLedger` at the first that is not.

    Proven is that a quorum made the record final, that it follows from the record before (hash, seed, position in
    the data, state_root, term, voters), and that no contribution counts for more than its plan allows. Where the
    round before is missing the record's own word is taken for what precedes it. The last state_root is its owner's
    word. ``after`` is the entry before the first of ``entries``, which somebody else proves.
    """
    before = after
    last = None if after is None else _believed(after)
    chain = Chain(0, rules.run_id, rules.genesis, 0)
    if after is not None and last is not None:
        chain = _chain_after(after, last, rules)
    for entry in entries:
        record = prove(entry, run_id=rules.run_id, coordinators=coordinators, open_envelope=open_envelope)
        missing = range(chain.rounds + 1, entry.round)
        if entry.round <= chain.rounds or entry.round > rules.rounds:
            raise BadLedger(entry.round, f"it stands after round {chain.rounds} of {rules.rounds}")
        fault = _link_fault(record.plan, chain, stated=before is None or before.state_root is not None)
        if fault := fault or _accounts_fault(record, rules) or _succession_fault(record, last, rules):
            raise BadLedger(entry.round, fault)
        yield Verified(record, missing)
        before, last, chain = entry, record, _chain_after(entry, record, rules)


def _believed(entry: Entry) -> Record:
    try:
        return claimed(entry.certificate).record
    except MalformedMessage as error:
        raise BadLedger(entry.round, f"its certificate proves nothing: {error}") from None


def _chain_after(entry: Entry, record: Record, rules: Rules) -> Chain:
    position = next_position(record.plan, rules.batch_size, rules.overlap_steps)
    return Chain(entry.round, record.hash, entry.state_root or bytes(32), position)


def prove(entry: Entry, *, run_id: bytes, coordinators: Sequence[str], open_envelope: Open) -> Record:
    """The record that an entry's certificate makes final. Raises :class:`BadLedger` where it proves nothing."""
    try:
        certificate = decode(Certificate, entry.certificate)
        proposal = certified(certificate, run_id=run_id, coordinators=coordinators, open_envelope=open_envelope)
    except (MalformedMessage, BadCertificate) as error:
        raise BadLedger(entry.round, f"its certificate proves nothing: {error}") from None
    record, term = proposal.record, proposal.term
    if record.plan.round != entry.round:
        raise BadLedger(entry.round, f"in its place is the certificate of round {record.plan.round}")
    if term < record.plan.term:
        raise BadLedger(
            entry.round, f"it was proposed in term {term}, and planned in the later term {record.plan.term}"
        )
    return record


def _link_fault(plan: Plan, chain: Chain, *, stated: bool) -> str | None:
    """Why ``plan`` does not follow from ``chain``, the last round there is; what is missing cannot contradict it.

    ``stated``: the state_root of ``chain`` is known.
    """
    if plan.round == chain.rounds + 1:
        known = chain if stated else Chain(chain.rounds, chain.head, plan.base_root, chain.position)
        return plan_fault(plan, known)
    if plan.position < chain.position:
        return f"its data begin before those of round {chain.rounds} end"
    return plan_fault(plan, Chain(plan.round - 1, plan.previous, plan.base_root, plan.position))


def _succession_fault(record: Record, last: Record | None, rules: Rules) -> str | None:
    """Why ``record`` cannot have been decided after ``last``, or None: terms only grow, and voters are named before."""
    if last is None:
        if record.plan.round > 1:
            return None
        return (
            _standing_fault(record, (), EMPTY, rules)
            if record.reconfiguration
            else "no reconfiguration names its voters"
        )
    if record.plan.term <= last.plan.term:
        return f"its term {record.plan.term} is not above that of round {last.plan.round}, {last.plan.term}"
    follows = record.plan.round == last.plan.round + 1
    return _standing_fault(record, last.standing, last.audit_state, rules) if follows else None


def _standing_fault(record: Record, standing: Sequence[Standing], audit_state: AuditState, rules: Rules) -> str | None:
    return standing_fault(record, standing, audit_state, rules) or audits_fault(record, audit_state, standing, rules)


def _accounts_fault(record: Record, rules: Rules) -> str | None:
    """Why what is accepted and left out cannot be so, or None."""
    if fault := quota_fault(record.plan, rules):
        return fault
    if record.plan.is_sharded and (fault := reducer_order_fault(record)):
        return fault
    members = {member.node: member for member in record.plan.members}
    accepted, excluded = [one.node for one in record.accepted], [one.node for one in record.excluded]
    if accepted != sorted(set(accepted)):
        return "accepted contributions are not in ascending order of node"
    if len(set(excluded)) != len(excluded) or set(accepted) & set(excluded):
        return "a member is left out twice, or accepted and left out"
    for node in (*accepted, *excluded):
        if node not in members:
            return f"{node[-6:]} is no member of the round"
    for one in record.accepted:
        if fault := contribution_fault(rules, record.plan, members[one.node], one.contribution):
            return f"the contribution of {one.node[-6:]}: {fault}"
    return None


def missing_rounds(there: Iterable[int]) -> tuple[range, ...]:
    """The gaps below the last of ``there``, rounds in ascending order: 3, 4, 7 lacks 1–2 and 5–6."""
    gaps, expected = [], 1
    for round_number in there:
        if round_number > expected:
            gaps.append(range(expected, round_number))
        expected = round_number + 1
    return tuple(gaps)
