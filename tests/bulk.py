"""Long ledgers of many nodes, with real signatures, for what has to be quick.

``python -m tests.bulk DIRECTORY ROUNDS NODES`` writes one with its manifest, as a node's directory has them.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from psyche.config import MANIFEST, Data, Manifest, Model, Resolved, Rounds, Run
from psyche.config.manifest import chain_rules
from psyche.config.run_config import Audits
from psyche.ledger.schema import audit_rows, member_rows, round_row
from psyche.ledger.store import NAME, Ledger
from psyche.network.identity import Identity
from psyche.numerics.digest import digest
from psyche.protocol.assignment import next_position
from psyche.protocol.audit_messages import EMPTY, AuditState, Finding, SealedVerdict, Verdict
from psyche.protocol.audits import asked, audits_after
from psyche.protocol.messages import (
    Accepted,
    Certificate,
    Member,
    Plan,
    Proposal,
    Reconfiguration,
    Record,
    Seal,
    Vote,
)
from psyche.protocol.proposals import round_seed
from psyche.protocol.round_state import Rules, StatementReceived
from psyche.protocol.standing import founding_weights, standing_after, weights_of
from psyche.protocol.wire import Body, encode_envelope
from tests.protocol.one_leader import contribution

COORDINATOR = Identity(bytes(31) + b"c", Path("unused"))


def bulk_manifest(rounds: int, rate: float = 0.0) -> Manifest:
    """Of a run in which contributions are audited at that rate."""
    digests = {key: f"{number:064x}" for number, key in enumerate(("store", "layout", "genesis"), 1)}
    return Manifest(
        run=Run(
            name="bulk",
            model=Model(settings={"vocab_size": 4096}),
            data=Data(),
            rounds=Rounds(total=rounds, inner_steps=5),
            audits=Audits(rate=rate),
        ),
        resolved=Resolved(coordinators=(COORDINATOR.peer_id,), parameters=4096, flat_size=4096, **digests),
    )


def bulk_chain(
    manifest: Manifest, nodes: int, payouts: Sequence[bytes] | None = None
) -> Iterator[tuple[bytes, Record, bytes]]:
    """Certificate, record, and state_root of each round of the run, with the votes of just a quorum.

    ``payouts`` are the addresses that nodes name, in the order of their names; one each by default.
    """
    rules = chain_rules(manifest)
    members = [Identity(b"bulk" + number.to_bytes(28, "big"), Path("unused")) for number in range(nodes)]
    members.sort(key=lambda one: one.peer_id)
    names = tuple(one.peer_id for one in members)
    named = dict(zip(names, payouts or [digest("payout", name.encode())[:20] for name in names], strict=True))
    plan: Plan | None = None
    head, root, standing, audit_state = rules.run_id, rules.genesis, (), EMPTY
    owners = {one.peer_id: one for one in members}
    for round_number in range(1, rules.rounds + 1):
        position = 0 if plan is None else next_position(plan, rules.batch_size, rules.overlap_steps)
        weights = weights_of(standing) or founding_weights(names)
        given = tuple(Member(name, rules.inner_steps, weights[name]) for name in names)
        plan = Plan(round_number, 2 * round_number - 1, head, root, round_seed(head), position, "gather", 0, given)
        accepted = tuple(
            Accepted(name, contribution(name, plan, rules, payload_bytes=1000, payout=named[name])) for name in names
        )
        audits_before = audit_state
        audit_state = audits_after(
            audit_state,
            standing,
            list(_heard(audit_state, round_number, owners, rules)),
            plan=plan,
            accepted=accepted,
            electorate=weights,
            suspects=(),
            rules=rules,
        )
        standing = standing_after(
            standing,
            plan=plan,
            electorate=weights,
            accepted=accepted,
            audit_state=audit_state,
            audits_before=audits_before,
            rules=rules,
        )
        reconfiguration = int(round_number == 1)
        votes = tuple(weights.values())
        record = Record(plan, accepted, (), reconfiguration, names, votes, standing, audit_state, (), (), (), ())
        yield _certify(record, members[: 2 * nodes // 3 + 1], rules), record, digest("root", record.hash)
        head, root = record.hash, digest("root", record.hash)


def _heard(
    audit_state: AuditState, round_number: int, owners: Mapping[str, Identity], rules: Rules
) -> Iterator[StatementReceived]:
    """What auditors say at once who are asked, and honest: they seal that it passes, and show it a round later."""
    for audit in audit_state.audits:
        verdict = Verdict(audit.accused, audit.round, Finding("measured", 0, 0, 100 + audit.round), bytes(32))
        spoken = {one.auditor: one.finding is not None for one in audit.opinions}
        for node in asked(audit, round_number, rules.audits):
            if spoken.get(node):
                continue
            sealed = SealedVerdict(audit.accused, audit.round, verdict.digest)
            body = verdict if node in spoken else sealed
            proof = owners[node].seal(body.DOMAIN, rules.run_id, audit.round, body.encode())
            yield StatementReceived(node, body, encode_envelope(proof))


def _certify(record: Record, voters: list[Identity], rules: Rules) -> bytes:
    round_number, term, own, previous = record.plan.round, record.plan.term + 1, record.hash, record.plan.previous

    def sealed(author: Identity, body: Body) -> bytes:
        return encode_envelope(author.seal(body.DOMAIN, rules.run_id, round_number, body.encode()))

    vote, reconfiguration = Vote(term, own), Reconfiguration(previous, record.reconfiguration, record.electorate)
    signed = (sealed(COORDINATOR, reconfiguration),) if record.reconfiguration else ()
    seal = sealed(COORDINATOR, Seal(previous, record.reconfiguration, own))
    proposal = sealed(COORDINATOR, Proposal(term, record, signed))
    return Certificate(proposal, tuple(sealed(one, vote) for one in voters), (seal,)).encode()


def bulk_ledger(
    directory: Path, rounds: int, nodes: int, payouts: Sequence[bytes] | None = None, rate: float = 0.0
) -> Manifest:
    """Write ledger and manifest of a run of so many rounds; in one transaction, or the disk is what takes longest."""
    manifest = bulk_manifest(rounds, rate)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).write_bytes(manifest.encode())
    Ledger.open(directory / NAME, manifest.run_id).close()
    with sqlite3.connect(directory / NAME) as writer:
        for certificate, record, root in bulk_chain(manifest, nodes, payouts):
            row = round_row(record)
            writer.execute("INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?)", (*row[:4], root, row[4], certificate))
            for table, rows in (("members", member_rows(record)), ("audits", audit_rows(record))):
                for one in rows:
                    writer.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(one))})", one)
    writer.close()
    return manifest


if __name__ == "__main__":
    bulk_ledger(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), rate=Audits().rate)
