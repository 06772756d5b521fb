"""Verifies that a chain of certificates is the history of a run, from its bytes and the manifest alone. Pure.

A ledger may begin late and have gaps, if its node joined late or was away. The rounds that are there are checked, each
on its own and against the one before it if that is there; the missing ones are named.
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
    """A chain is not the history of the run. ``round`` is the first invalid one; the message names it."""

    def __init__(self, round_number: int, reason: str) -> None:
        super().__init__(round_number, reason)  # the arguments it is unpickled with in another process
        self.round, self.reason = round_number, reason

    def __str__(self) -> str:
        return f"round {self.round}: {self.reason}"


@dataclass(frozen=True)
class Entry:
    """A round as a ledger holds it."""

    round: int
    certificate: bytes
    state_root: bytes | None
    """State root after the round, as the ledger says; None if its owner did not know. The next round proves it."""


@dataclass(frozen=True)
class Verified:
    """A verified round."""

    record: Record
    missing: range
    """Rounds missing in the ledger between the previous one and this one."""

    @property
    def tokens(self) -> Mapping[str, int]:
        """Accepted tokens by node."""
        return {one.node: one.contribution.tokens for one in self.record.accepted}


def claimed(certificate: bytes) -> Proposal:
    """Decode a certificate's proposal without checking signatures. Raises :class:`MalformedMessage`."""
    return decode(Proposal, decode_envelope(decode(Certificate, certificate).proposal).body)


def verify_chain(
    entries: Iterable[Entry],
    *,
    rules: Rules,
    coordinators: Sequence[str],
    open_envelope: Open,
    after: Entry | None = None,
) -> Iterator[Verified]:
    """Yield each entry once it is verified. Raises :class:`BadLedger` at the first invalid one.

    Verified is that a quorum certified the record, that it follows from the record before (hash, seed, data position,
    state root, term, voting weights, audits), and that no contribution counts for more than its plan allows. If the
    round before is missing, the record's own statement of it is taken. The last state root is not proven. ``after`` is
    the entry before the first of ``entries``, which the caller verifies elsewhere.
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
            raise BadLedger(entry.round, f"it follows round {chain.rounds} of {rules.rounds}")
        fault = _link_fault(record.plan, chain, stated=before is None or before.state_root is not None)
        if fault := fault or _accounts_fault(record, rules) or _succession_fault(record, last, rules):
            raise BadLedger(entry.round, fault)
        yield Verified(record, missing)
        before, last, chain = entry, record, _chain_after(entry, record, rules)


def _believed(entry: Entry) -> Record:
    try:
        return claimed(entry.certificate).record
    except MalformedMessage as error:
        raise BadLedger(entry.round, f"invalid certificate: {error}") from None


def _chain_after(entry: Entry, record: Record, rules: Rules) -> Chain:
    position = next_position(record.plan, rules.batch_size, rules.overlap_steps)
    return Chain(entry.round, record.hash, entry.state_root or bytes(32), position)


def prove(entry: Entry, *, run_id: bytes, coordinators: Sequence[str], open_envelope: Open) -> Record:
    """Verify an entry's certificate and return its record. Raises :class:`BadLedger`."""
    try:
        certificate = decode(Certificate, entry.certificate)
        proposal = certified(certificate, run_id=run_id, coordinators=coordinators, open_envelope=open_envelope)
    except (MalformedMessage, BadCertificate) as error:
        raise BadLedger(entry.round, f"invalid certificate: {error}") from None
    record, term = proposal.record, proposal.term
    if record.plan.round != entry.round:
        raise BadLedger(entry.round, f"its certificate is of round {record.plan.round}")
    if term < record.plan.term:
        raise BadLedger(
            entry.round, f"it was proposed in term {term}, and planned in the later term {record.plan.term}"
        )
    return record


def _link_fault(plan: Plan, chain: Chain, *, stated: bool) -> str | None:
    """Return why ``plan`` does not follow from ``chain``, the last round before it in the ledger, or None.

    ``stated``: the state root of ``chain`` is known.
    """
    if plan.round == chain.rounds + 1:
        known = chain if stated else Chain(chain.rounds, chain.head, plan.base_root, chain.position)
        return plan_fault(plan, known)
    if plan.position < chain.position:
        return f"its data begin before those of round {chain.rounds} end"
    return plan_fault(plan, Chain(plan.round - 1, plan.previous, plan.base_root, plan.position))


def _succession_fault(record: Record, last: Record | None, rules: Rules) -> str | None:
    """Return why ``record`` cannot follow ``last``, or None: terms only grow, and weights and audits follow."""
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
    """Return what is wrong with the accepted and excluded contributions, or None."""
    if fault := quota_fault(record.plan, rules):
        return fault
    if record.plan.is_sharded and (fault := reducer_order_fault(record)):
        return fault
    members = {member.node: member for member in record.plan.members}
    accepted, excluded = [one.node for one in record.accepted], [one.node for one in record.excluded]
    if accepted != sorted(set(accepted)):
        return "accepted contributions are not in ascending order of node"
    if len(set(excluded)) != len(excluded) or set(accepted) & set(excluded):
        return "a member is excluded twice, or both accepted and excluded"
    for node in (*accepted, *excluded):
        if node not in members:
            return f"{node[-6:]} is not a member of the round"
    for one in record.accepted:
        if fault := contribution_fault(rules, record.plan, members[one.node], one.contribution):
            return f"the contribution of {one.node[-6:]}: {fault}"
    return None


def missing_rounds(there: Iterable[int]) -> tuple[range, ...]:
    """Return the gaps below the last of ``there``, which ascends: of 3, 4, 7 they are 1–2 and 5–6."""
    gaps, expected = [], 1
    for round_number in there:
        if round_number > expected:
            gaps.append(range(expected, round_number))
        expected = round_number + 1
    return tuple(gaps)
