"""Chains of certificates with real signatures, and the manifest to verify them against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from psyche.config import Data, Manifest, Model, Resolved, Rounds, Run
from psyche.exchange.rules import rules_of
from psyche.network.identity import Identity, open_envelope
from psyche.numerics.digest import digest
from psyche.protocol.assignment import next_position
from psyche.protocol.audit_messages import EMPTY
from psyche.protocol.audits import audits_after
from psyche.protocol.chain import Entry, Verified, verify_chain
from psyche.protocol.messages import (
    Accepted,
    Certificate,
    Excluded,
    ExclusionReason,
    Member,
    Plan,
    Proposal,
    Reconfiguration,
    Record,
    Seal,
    Vote,
)
from psyche.protocol.proposals import round_seed
from psyche.protocol.round_state import Rules
from psyche.protocol.standing import founding_weights, standing_after, weights_of
from psyche.protocol.wire import Body, encode_envelope
from tests.protocol.one_leader import contribution

COORDINATOR, STRANGER, *MEMBERS = (Identity(bytes([n]) * 32, Path("unused")) for n in range(1, 7))
MEMBERS.sort(key=lambda identity: identity.peer_id)
NAMES = tuple(member.peer_id for member in MEMBERS)
REASON = ExclusionReason.NO_COMMITMENT


def manifest(name: str = "ledger") -> Manifest:
    """Return the manifest of a run of ten rounds; another name is another run."""
    digests = {key: f"{number:064x}" for number, key in enumerate(("store", "layout", "genesis"), 1)}
    return Manifest(
        run=Run(
            name=name,
            model=Model(settings={"vocab_size": 4096}),
            data=Data(),
            rounds=Rounds(total=10, inner_steps=5),
        ),
        resolved=Resolved(coordinators=(COORDINATOR.peer_id,), parameters=4096, flat_size=4096, **digests),
    )


MANIFEST = manifest()
RULES = rules_of(MANIFEST)


@dataclass(frozen=True)
class Link:
    """A certified round: certificate, record, and the state root after it."""

    certificate: bytes
    record: Record
    root: bytes

    @property
    def entry(self) -> Entry:
        return Entry(self.record.plan.round, self.certificate, self.root)


def chain(
    rounds: int,
    *,
    left_out: Callable[[int], int] = lambda round_number: round_number % 2,
    edit: Callable[[Record], Record] = lambda record: record,
    flavour: bytes = b"",
) -> list[Link]:
    """Return a chain of ``rounds`` rounds, in each of which the last ``left_out(round)`` members are excluded.

    ``edit`` changes a record before all sign it, as a coordinator colluding with its members could. ``flavour`` yields
    other states.
    """
    links: list[Link] = []
    for _ in range(rounds):
        links.append(link(links[-1] if links else None, left_out, edit, flavour))
    return links


def link(
    before: Link | None,
    left_out: Callable[[int], int] = lambda round_number: 0,
    edit: Callable[[Record], Record] = lambda record: record,
    flavour: bytes = b"",
) -> Link:
    """Return the round after ``before``, or the first."""
    if before is None:
        round_number, previous, base, position = 1, RULES.run_id, RULES.genesis, 0
    else:
        last = before.record.plan
        round_number, previous, base = last.round + 1, before.record.hash, before.root
        position = next_position(last, RULES.batch_size, RULES.overlap_steps)
    standing, audits_before = (before.record.standing, before.record.audit_state) if before else ((), EMPTY)
    weights = weights_of(standing) or founding_weights(NAMES)
    members = tuple(Member(name, RULES.inner_steps, weights.get(name, 0)) for name in NAMES)
    plan = Plan(
        round_number, 2 * round_number - 1, previous, base, round_seed(previous), position, "gather", 0, members
    )
    out = left_out(round_number)
    accepted, excluded = NAMES[: len(NAMES) - out], NAMES[len(NAMES) - out :]
    given = tuple(Accepted(name, contribution(name, plan, RULES)) for name in accepted)
    audit_state = audits_after(
        audits_before, standing, (), plan=plan, accepted=given, electorate=weights, suspects=(), rules=RULES
    )
    record = edit(
        Record(
            plan=plan,
            accepted=given,
            excluded=tuple(Excluded(name, REASON) for name in excluded),
            reconfiguration=int(before is None),
            electorate=tuple(weights),
            voting_weights=tuple(weights.values()),
            standing=standing_after(
                standing,
                plan=plan,
                electorate=weights,
                accepted=given,
                audit_state=audit_state,
                audits_before=audits_before,
                rules=RULES,
            ),
            audit_state=audit_state,
            commitments=(),
            reducer_order=(),
            results=(),
            dissenters=(),
        )
    )
    return Link(certify(record), record, digest("root", record.hash, flavour))


def certify(record: Record, voters: int = len(NAMES)) -> bytes:
    """Return the certificate of ``record`` with the votes of the first ``voters`` members."""
    round_number, term = record.plan.round, record.plan.term + 1
    ballots = tuple(sealed(member, Vote(term, record.hash), round_number) for member in MEMBERS[:voters])
    previous, reconfiguration = record.plan.previous, ()
    if record.reconfiguration:
        reconfiguration = (
            sealed(COORDINATOR, Reconfiguration(previous, record.reconfiguration, record.electorate), round_number),
        )
    seal = sealed(COORDINATOR, Seal(previous, record.reconfiguration, record.hash), round_number)
    return Certificate(
        sealed(COORDINATOR, Proposal(term, record, reconfiguration), round_number), ballots, (seal,)
    ).encode()


def sealed(author: Identity, body: Body, round_number: int) -> bytes:
    return encode_envelope(author.seal(body.DOMAIN, RULES.run_id, round_number, body.encode()))


def with_plan(**changes: object) -> Callable[[Record], Record]:
    """Return an ``edit`` that changes the plan of round 3."""

    def edit(record: Record) -> Record:
        if record.plan.round != 3:
            return record
        return msgspec.structs.replace(record, plan=msgspec.structs.replace(record.plan, **changes))

    return edit


def verified(entries: list[Entry], rules: Rules = RULES) -> list[Verified]:
    """Verify all entries. Raises :class:`BadLedger`."""
    return list(verify_chain(entries, rules=rules, coordinators=(COORDINATOR.peer_id,), open_envelope=open_envelope))
