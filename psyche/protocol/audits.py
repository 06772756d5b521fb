"""Audits: which contributions are replayed, by which nodes, and how a record's audit state follows from the last. Pure.

    drawn -> one auditor (sometimes two) -> passes: passed
                                            fails: a jury -> two thirds of its weight decide
                                            declines: the next candidate is asked

Every node computes the audit state from the record before and the auditors' statements; a record whose audit state does
not follow gets no vote. An auditor first puts the digest of its verdict on record and reveals the verdict in a later
round, so that no auditor can copy another. Rounds do not wait for audits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from statistics import median_low
from typing import get_args

import msgspec

from psyche.numerics.digest import digest
from psyche.protocol.audit_messages import (
    EMPTY,
    JURY,
    Audit,
    Auditable,
    AuditState,
    AuditStatement,
    Closed,
    DeclinedAudit,
    Opinion,
    Pool,
    Verdict,
)
from psyche.protocol.audit_outcome import Judgement, decide
from psyche.protocol.messages import Accepted, Plan, Record, Standing
from psyche.protocol.round_state import AuditRules, Rules, StatementReceived
from psyche.protocol.wire import MalformedMessage, decode, decode_envelope

NEW = 2
"""Added to the risk of a node on probation: its identity cost nothing, and it has nothing to lose yet."""
OVERDUE = 1
"""Added to the risk of a node that was not audited for twice the average interval, which happens by chance with
probability e⁻² at a constant rate."""
MOST_WITHHELD = 3
"""Audits in a row for which a node does not hand over its work before it is convicted. Each was asked for by three
auditors, three times each. At the default rate that is some 60 rounds in which a node serves its payloads, without
which they would not be accepted, and not its audit data."""
SUSPECT = 20
"""Factor on the audit rate for outliers: at the default rate of 1 in 20 all of them are audited."""


class InvalidAudits(ValueError):
    """The audits in a record do not follow from those in the record before."""


def asked(audit: Audit, round_number: int, rules: AuditRules) -> tuple[str, ...]:
    """Return the candidates whose statement can come on record in a round: one more for each ``patience`` rounds."""
    return audit.able[: audit.looks + (round_number - audit.since) // rules.patience]


def busy(
    audit_state: AuditState, round_number: int, rules: AuditRules, pending: Iterable[StatementReceived] = ()
) -> frozenset[str]:
    """Return the nodes asked to audit in a round that have neither sealed a verdict nor declined.

    ``pending`` are statements that are not on record yet.
    """
    answered = {(one.key, one.node) for one in pending}
    return frozenset(
        node
        for audit in audit_state.audits
        for node in asked(audit, round_number, rules)
        if all(one.auditor != node for one in audit.opinions) and ((audit.accused, audit.round), node) not in answered
    )


def audited_tokens(audit_state: AuditState) -> dict[tuple[str, int], int]:
    """Return the tokens of each contribution under audit, by accused and round."""
    return {(audit.accused, audit.round): audit.tokens for audit in audit_state.audits}


# --------------------------------------------------------------------------------- who audits whom


def pool_of(plan: Plan, accepted: Sequence[Accepted], rules: Rules) -> Pool:
    """Return the contributions that audits of a round are drawn from: all but private ones, if the run has audits."""
    if not rules.audits.rate:
        return EMPTY.pool
    given = {one.node: one.contribution for one in accepted if not one.contribution.private}
    found = (Auditable(node, given[node].tokens) for node in sorted(given))
    return Pool(seed_of(plan, accepted, rules.run_id), tuple(found))


def seed_of(plan: Plan, accepted: Sequence[Accepted], run_id: bytes) -> bytes:
    """Return the seed that draws who is audited.

    It is a hash of the round's seed and of all commitments, whose salts nobody else knew, so that no node can know in
    time in which round it has to be honest.
    """
    given = {one.node: one.contribution for one in accepted}
    return digest("audits", plan.seed, *(given[node].commitment(node, run_id, plan.round) for node in sorted(given)))


def by_chance(pool: Pool, round_number: int, standing: Sequence[Standing], rules: Rules) -> Iterator[str]:
    """Yield the nodes whose contribution is drawn at random. ``standing`` is of the record before."""
    known = {one.node: one for one in standing}
    for one in pool.given:
        risk = _risk(known.get(one.node), round_number, rules)
        if chance(digest("audited", pool.seed, one.node.encode()), rules.audits.rate * risk):
            yield one.node


def by_suspicion(pool: Pool, suspects: Collection[str], rules: Rules) -> Iterator[str]:
    """Yield the nodes whose contribution is drawn because it was an outlier."""
    for node in sorted(suspects):
        if chance(digest("suspected", pool.seed, node.encode()), rules.audits.rate * SUSPECT):
            yield node


def auditors(accepted: Sequence[Accepted], electorate: Mapping[str, int], out: Collection[str]) -> dict[str, int]:
    """Return the nodes that may be asked for an audit that a record opens, and their voting weights.

    They are its electorate, which holds what the round was trained from; but nobody of ``out``, and nobody who trains
    on private data and so lacks the run's text.
    """
    private = {one.node for one in accepted if one.contribution.private}
    return {node: electorate[node] for node in sorted(electorate) if node not in private and node not in out}


def opened(
    pool: Pool,
    round_number: int,
    since: int,
    accused: Iterable[str],
    auditors: Mapping[str, int],
    out: Collection[str],
) -> Iterator[Audit]:
    """Yield audits of contributions to a round by nodes that are not in ``out``, drawn in the record of ``since``.

    ``auditors`` are voting weights. Those who contributed come first, because they are here.
    """
    contributed = {one.node for one in pool.given}
    for node in accused:
        given = pool.of(node)
        others = {one: weight for one, weight in auditors.items() if one != node}
        if given is not None and others and node not in out:
            first = _drawn({one: weight for one, weight in others.items() if one in contributed}, pool.seed, node)
            rest = _drawn({one: weight for one, weight in others.items() if one not in contributed}, pool.seed, node)
            seats = (*first, *rest)[:JURY]
            weights = tuple(others[one] for one in seats)
            yield Audit(node, round_number, given.tokens, 1, since, seats, weights, ())


def _drawn(weights: Mapping[str, int], seed: bytes, accused: str) -> list[str]:
    """Draw up to ``JURY`` nodes in order, each with a probability proportional to its weight, without replacement."""
    left = dict(weights)
    seats: list[str] = []
    while left and len(seats) < JURY:
        hash = digest("auditor", seed, accused.encode(), len(seats).to_bytes(8, "little"))
        point = int.from_bytes(hash, "little") % sum(left.values())
        for node, weight in left.items():
            point -= weight
            if point < 0:
                seats.append(node)
                break
        del left[seats[-1]]
    return seats


def _risk(standing: Standing | None, round_number: int, rules: Rules) -> int:
    """Return the factor on the audit rate for a node."""
    rounds, last = (0, 0) if standing is None else (standing.rounds, standing.audited)
    return 1 + NEW * (rounds < rules.probation) + OVERDUE * ((round_number - last) * rules.audits.rate > 2)


def chance(hash: bytes, probability: float) -> bool:
    """Return True for a fraction ``probability`` of all hashes."""
    return int.from_bytes(hash[:8], "little") < int(probability * 2**64)


# ----------------------------------------------------------------------------- what follows from it


def audits_after(
    before: AuditState,
    standing: Sequence[Standing],
    said: Sequence[StatementReceived],
    *,
    plan: Plan,
    accepted: Sequence[Accepted],
    electorate: Mapping[str, int],
    suspects: Collection[str],
    rules: Rules,
) -> AuditState:
    """Return the audit state of the record of ``plan``. ``before`` and ``standing`` are of the record before.

    Raises :class:`InvalidAudits` if one of the statements ``said`` is not allowed.
    """
    audits = {(audit.accused, audit.round): audit for audit in before.audits}
    for one in said:
        if one.key not in audits:
            raise InvalidAudits(f"{one.node[-6:]} made a statement on an audit that is not open")
        audits[one.key] = _heard(audits[one.key], one, plan.round, rules.audits)
    fresh = {one.key for one in said if isinstance(one.body, Verdict)}
    withheld = {one.node: one.withheld for one in standing}
    judged = {
        key: _repeated(_judged(one, plan, before, rules.audits, fresh=key in fresh), withheld)
        for key, one in audits.items()
    }
    closed = [one for one in judged.values() if isinstance(one, Closed)]
    convicted = {one.accused for one in closed if one.outcome == "convicted"} | {n for one in closed for n in one.lied}
    still = [one for one in judged.values() if isinstance(one, Audit) and one.accused not in convicted]
    banned = {*before.banned, *convicted}
    pool, now, last = pool_of(plan, accepted, rules), plan.round, plan.round - 1
    asked_from = auditors(accepted, electorate, banned)
    suspected = (node for node in by_suspicion(before.pool, suspects, rules) if (node, last) not in audits)
    new = [
        *opened(before.pool, last, now, suspected, asked_from, banned),
        *opened(pool, now, now, by_chance(pool, now, standing, rules), asked_from, banned),
    ]
    return AuditState(
        statements=tuple(one.proof for one in said),
        audits=tuple(sorted((*still, *new), key=lambda one: (one.round, one.accused))),
        closed=tuple(sorted(closed, key=lambda one: (one.round, one.accused))),
        suspects=tuple(sorted(suspects)),
        banned=tuple(sorted(banned)),
        pool=pool,
    )


def _heard(audit: Audit, said: StatementReceived, round_number: int, rules: AuditRules) -> Audit:
    """Return ``audit`` with one more statement on record. Raises :class:`InvalidAudits`."""
    author, body = said.node, said.body
    mine = next((one for one in audit.opinions if one.auditor == author), None)
    if not isinstance(body, Verdict):
        if mine is not None:
            raise InvalidAudits(f"{author[-6:]} has already sealed a verdict on {audit.accused[-6:]}")
        if author not in asked(audit, round_number, rules):
            raise InvalidAudits(f"{author[-6:]} was not asked to audit {audit.accused[-6:]}, or has declined")
        if isinstance(body, DeclinedAudit):
            return msgspec.structs.replace(audit, declined=(*audit.declined, author))
        return msgspec.structs.replace(audit, opinions=(*audit.opinions, Opinion(author, body.digest, None)))
    if mine is None or mine.finding is not None or mine.digest != body.digest:
        raise InvalidAudits(f"the verdict of {author[-6:]} on {audit.accused[-6:]} is not the one it sealed")
    shown = tuple(
        msgspec.structs.replace(one, finding=body.finding) if one.auditor == author else one for one in audit.opinions
    )
    return msgspec.structs.replace(audit, opinions=shown)


def _judged(audit: Audit, plan: Plan, before: AuditState, rules: AuditRules, *, fresh: bool) -> Audit | Closed:
    """Return the audit with the number of auditors that it now needs, or how it ended."""
    second = digest("second look", plan.previous, audit.accused.encode(), audit.round.to_bytes(8, "little"))
    found: Judgement = decide(
        audit,
        rules,
        fresh=fresh,
        again=chance(second, rules.second),
        late=plan.round - audit.since > rules.patience,
        expired=plan.round - audit.round >= rules.window or audit.accused in before.banned,
    )
    if isinstance(found, int):
        return msgspec.structs.replace(audit, looks=found, since=plan.round) if found != audit.looks else audit
    gains = [one.finding.gain for one in audit.opinions if one.finding is not None and one.auditor in found.right]
    return Closed(
        audit.accused,
        audit.round,
        found.outcome,
        tuple(sorted(found.right)),
        tuple(sorted(found.lied)),
        median_low(gains) if gains else 0,
    )


def _repeated(found: Audit | Closed, withheld: Mapping[str, int]) -> Audit | Closed:
    """Convict a node that has not handed over its work several times in a row, without an audit passed in between."""
    if not isinstance(found, Closed) or found.outcome != "unserved":
        return found
    if withheld.get(found.accused, 0) + 1 >= MOST_WITHHELD:
        return msgspec.structs.replace(found, outcome="convicted")
    return found


# ----------------------------------------------------------------------------- of records and messages


def statement(proof: bytes) -> StatementReceived:
    """Decode an auditor's signed statement without checking its signature. Raises ``MalformedMessage``."""
    envelope = decode_envelope(proof)
    kinds: Mapping[str, type[AuditStatement]] = {kind.DOMAIN: kind for kind in get_args(AuditStatement)}
    if (kind := kinds.get(envelope.domain)) is None:
        raise MalformedMessage(f"{envelope.domain!r} is not a statement on an audit")
    body = decode(kind, envelope.body)
    if body.round != envelope.round:
        raise MalformedMessage(f"the statement is on round {body.round} and signed for round {envelope.round}")
    return StatementReceived(envelope.author, body, proof)


def statements(audit_state: AuditState) -> list[StatementReceived]:
    """Decode the statements on record without checking signatures. Raises ``MalformedMessage``."""
    return [statement(proof) for proof in audit_state.statements]


def admissible(
    audit_state: AuditState, said: Iterable[StatementReceived], round_number: int, rules: AuditRules
) -> Iterator[StatementReceived]:
    """Yield those of ``said`` that can come on record in a round, at most one of each author on each audit."""
    audits = {(audit.accused, audit.round): audit for audit in audit_state.audits}
    taken: set[tuple[tuple[str, int], str]] = set()
    for one in sorted(said, key=lambda one: (one.body.round, one.body.accused, one.node, one.body.DOMAIN)):
        if one.key not in audits or (one.key, one.node) in taken:
            continue
        try:
            _heard(audits[one.key], one, round_number, rules)
        except InvalidAudits:
            continue
        taken.add((one.key, one.node))
        yield one


def audits_fault(record: Record, before: AuditState, standing: Sequence[Standing], rules: Rules) -> str | None:
    """Return what is wrong with the audits in ``record``, or None. The other arguments are of the record before."""
    if {member.node for member in record.plan.members} & set(before.banned):
        return "a convicted node is a member of the round"
    if not set(record.audit_state.suspects) <= {one.node for one in before.pool.given}:
        return "an outlier did not contribute to the round before"
    try:
        due = audits_after(
            before,
            standing,
            statements(record.audit_state),
            plan=record.plan,
            accepted=record.accepted,
            electorate=record.weights,
            suspects=record.audit_state.suspects,
            rules=rules,
        )
    except (InvalidAudits, MalformedMessage) as error:
        return str(error)
    return None if record.audit_state == due else "the audits do not follow from those of the record before"
