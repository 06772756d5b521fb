"""The expected outcome of a chain, computed in one process from its records and payloads."""

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

DATA_ORDERS = (0, 1, 2)
"""Data assignments of undisturbed runs: 0 is the run's own."""


@dataclass(frozen=True)
class Losses:
    """Held-out losses, nats per token."""

    before: float
    """Of the model before the first round."""
    after: float
    """Of the run's final model."""
    undisturbed: float
    """Of a model trained on the same tokens without faults."""
    reordered: tuple[float, ...]
    """The same with data assigned differently in each round: the spread is noise."""


def records_of(ledgers: Sequence[Path]) -> list[Record]:
    """Return the records of all rounds that any of the ledgers holds, in order."""
    found: dict[int, Record] = {}
    for path in ledgers:
        with Ledger.read(path) as ledger:
            found |= {entry.round: claimed(entry.certificate).record for entry in ledger.entries()}
    assert sorted(found) == list(range(1, len(found) + 1)), "a round is missing"
    return [found[round_number] for round_number in sorted(found)]


@dataclass(frozen=True)
class Reference:
    """Replicas of a run's nodes with their data, without a network. ``keys`` are the nodes' key files."""

    manifest: Manifest
    node: Node
    keys: tuple[Path, ...]

    def replay(self, records: Sequence[Record], payloads: Path) -> tuple[list[bytes], Replica]:
        """Apply ``records`` from the genesis; return the state root after each and the replica that applied them.

        ``payloads`` is a folder with the payloads of all journals.
        """
        journal = PayloadJournal(payloads, warn=_fail)
        taker = next(iter(self.replicas().values()))
        roots = []
        for record in records:
            taker.apply(record, _gradient(taker, record, journal))
            roots.append(taker.chain.state_root)
        return roots, taker

    def losses(self, records: Sequence[Record], after: Replica) -> Losses:
        """Return all losses; ``after`` has applied ``records``."""
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            undisturbed = [pool.submit(self.undisturbed, records, order) for order in DATA_ORDERS]
            before, now = _loss(next(iter(self.replicas().values()))), _loss(after)
            same, *reordered = (one.result() for one in undisturbed)
        return Losses(before, now, same, tuple(reordered))

    def undisturbed(self, records: Sequence[Record], order: int) -> float:
        """Return the loss after the rounds of ``records`` if no node had lost any state.

        In each round exactly the accepted nodes train, on the same tokens; they keep their optimizer states and error
        feedback, of which crashed nodes have lost some. ``order`` is one of DATA_ORDERS.
        """
        trained = {one.node for record in records for one in record.accepted}
        replicas = {node: one for node, one in self.replicas().items() if node in trained}
        for record in records:
            plan = _reordered(record.plan, order)
            works = {one.node: replicas[one.node].train(plan).payload for one in record.accepted}
            for one in replicas.values():
                one.apply(record, one.gradient_of(record, works))
        return _loss(next(iter(replicas.values())))

    def replicas(self) -> dict[str, Replica]:
        """Return a fresh replica for each node, by PeerID."""
        identities = map(Identity.load_or_create, self.keys)
        return {identity.peer_id: replica(self.manifest, self.node, identity) for identity in identities}


def _reordered(plan: Plan, order: int) -> Plan:
    """Return ``plan`` with its data assigned to nodes differently."""
    return msgspec.structs.replace(plan, seed=digest("deal", plan.seed, bytes([order]))) if order else plan


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
    assert blob is not None, f"no journal has a payload of round {record.plan.round}: {root.hex()}"
    return blob


def _loss(one: Replica) -> float:
    total, tokens = one.heldout_loss(0, 1)
    return total / tokens


def _fail(text: str) -> None:
    raise AssertionError(text)
