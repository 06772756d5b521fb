"""What must have come of a chain, computed in one process from its records and the payloads that they name."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import msgspec

from psyche.config import Manifest, Node
from psyche.diloco.replica import Replica
from psyche.exchange.aggregation import Aggregation
from psyche.exchange.payload_journal import PayloadJournal
from psyche.ledger.store import Ledger
from psyche.network.identity import Identity
from psyche.network.spool import Blob
from psyche.numerics.aggregate import Gradient, result_gradient
from psyche.numerics.digest import digest
from psyche.protocol.chain import claimed
from psyche.protocol.messages import Plan, Record
from tests.tiny import replica

DEALS = (0, 1, 2)
"""Of an undisturbed run: as the run dealt its data, and otherwise."""


@dataclass(frozen=True)
class Losses:
    """On the held-out set, nats a token."""

    before: float
    """Of the model before the first round."""
    after: float
    """Of the run's model."""
    undisturbed: float
    """Of the model that nodes to whom nothing happened make of the same tokens."""
    dealt: tuple[float, ...]
    """The same, when each round's data are dealt to its nodes otherwise: what differs there is noise."""


def records_of(ledgers: Sequence[Path]) -> list[Record]:
    """The records of all rounds that any of the ledgers holds, in order."""
    found: dict[int, Record] = {}
    for path in ledgers:
        with Ledger.read(path) as ledger:
            found |= {entry.round: claimed(entry.certificate).record for entry in ledger.entries()}
    assert sorted(found) == list(range(1, len(found) + 1)), "a round is missing"
    return [found[round_number] for round_number in sorted(found)]


@dataclass(frozen=True)
class Reference:
    """Replicas of a run's nodes, with their data, away from any network. ``keys`` are the nodes' key files."""

    manifest: Manifest
    node: Node
    keys: tuple[Path, ...]

    def replay(self, records: Sequence[Record], payloads: Path) -> tuple[list[bytes], Replica]:
        """The outer steps of ``records`` from the genesis: the state_root after each, and who took them.

        ``payloads`` is a folder with all that any node's journal ever held.
        """
        journal = PayloadJournal(payloads, warn=_fail)
        taker = next(iter(self.replicas().values()))
        roots = []
        for record in records:
            taker.apply(record, _gradient(taker, record, journal))
            roots.append(taker.chain.state_root)
        return roots, taker

    def losses(self, records: Sequence[Record], after: Replica) -> Losses:
        """``after`` has taken the outer steps of ``records``."""
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            undisturbed = [pool.submit(self.undisturbed, records, deal) for deal in DEALS]
            before, now = _loss(next(iter(self.replicas().values()))), _loss(after)
            same, *dealt = (one.result() for one in undisturbed)
        return Losses(before, now, same, tuple(dealt))

    def undisturbed(self, records: Sequence[Record], deal: int) -> float:
        """The loss after the rounds of ``records`` if nobody had lost anything in between.

        In each round the same nodes train on the same tokens, and nobody else; they keep their optimizers and their
        error feedback, which nodes that crashed have lost some of. ``deal`` is one of DEALS.
        """
        trained = {one.node for record in records for one in record.accepted}
        replicas = {node: one for node, one in self.replicas().items() if node in trained}
        for record in records:
            plan = _dealt(record.plan, deal)
            works = {one.node: replicas[one.node].train(plan).payload for one in record.accepted}
            for one in replicas.values():
                one.apply(record, one.gradient_of(record, works))
        return _loss(next(iter(replicas.values())))

    def replicas(self) -> dict[str, Replica]:
        """One of each node, by PeerID, as the run began."""
        identities = map(Identity.load_or_create, self.keys)
        return {identity.peer_id: replica(self.manifest, self.node, identity) for identity in identities}


def _dealt(plan: Plan, deal: int) -> Plan:
    """``plan`` with its data in another order, and so in other hands."""
    return msgspec.structs.replace(plan, seed=digest("deal", plan.seed, bytes([deal]))) if deal else plan


def _gradient(taker: Replica, record: Record, journal: PayloadJournal) -> Gradient:
    if not record.results:
        given = {one.node: one.contribution for one in record.accepted}
        payloads = {one.node: _blob(record, one.contribution.payload_root, journal) for one in record.accepted}
        return Aggregation.of(taker.run).gradient(taker.codec, record.plan, given, payloads)
    results = [_blob(record, root, journal) for root in record.results]

    def encoded(number: int) -> bytes:
        position, group = divmod(number, len(results))
        return results[group][position]

    return result_gradient(taker.backend.codec(taker.run.result_codec), encoded)


def _blob(record: Record, root: bytes, journal: PayloadJournal) -> Blob:
    blob = journal.blob(root)
    assert blob is not None, f"what round {record.plan.round} took was in nobody's journal: {root.hex()}"
    return blob


def _loss(one: Replica) -> float:
    total, tokens = one.heldout_loss(0, 1)
    return total / tokens


def _fail(text: str) -> None:
    raise AssertionError(text)
