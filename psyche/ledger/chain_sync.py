"""Fetch certified rounds from other nodes' ledgers. No node is trusted: a certificate proves its record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from psyche.config import Manifest
from psyche.ledger.certificate_check import certified_record
from psyche.ledger.writer import LedgerWriter
from psyche.network.rpc import Rpc
from psyche.network.transport import Network, Refused, Unreachable, Violation
from psyche.protocol.acceptor import Chain
from psyche.protocol.certificates import BadCertificate
from psyche.protocol.chain import claimed
from psyche.protocol.messages import Certificate, Record
from psyche.protocol.wire import MalformedMessage, decode

MAX_REPLY_BYTES = 4 << 20
"""Certificates in one reply; a single certificate may be larger."""
MAX_BACKFILL_BYTES = 64 << 20
"""Certificates fetched from one peer before they are checked."""
CALL_SECONDS = 15.0
MAX_ROUND = 2**62

CertifiedRecord = tuple[Record, bytes]
"""A record, and the encoded certificate that makes it final."""


class Certificates(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Encoded certificates of consecutive rounds."""

    encoded: Annotated[tuple[bytes, ...], Meta(max_length=4096)]


async def serve_chain(network: Network, ledger: LedgerWriter) -> None:
    """Answer requests for certificates from a round on."""

    async def history(peer: str, request: bytes) -> bytes:
        first = min(int.from_bytes(request, "little"), MAX_ROUND)
        return msgspec.msgpack.encode(Certificates(tuple(await ledger.certificates(first, MAX_REPLY_BYTES))))

    await network.rpc.serve("history", history, max_request=8)


def verified_successors(manifest: Manifest, encoded: Sequence[bytes], chain: Chain) -> list[CertifiedRecord]:
    """Return the records of ``encoded`` that extend ``chain`` one after the other, up to the first invalid one.

    The electorate of each round is the one that the record before names. The base state of a record is not compared
    with ``chain``: taking its outer step does that.
    """
    found: list[CertifiedRecord] = []
    for item in encoded:
        record = _verified(manifest, item)
        if record is None or (record.plan.round, record.plan.previous) != (chain.rounds + 1, chain.head):
            break
        if not record.reconfiguration and record.weights != chain.weights:
            break
        found.append((record, item))
        chain = Chain(record.plan.round, record.hash, b"", 0, record.standing, record.audit_state)
    return found


class ChainFetcher:
    """Fetches certified rounds from peers. Signatures are verified on a thread."""

    def __init__(self, manifest: Manifest, rpc: Rpc) -> None:
        self._manifest, self._rpc = manifest, rpc

    async def fetch_after(self, chain: Chain, peers: Sequence[str]) -> list[CertifiedRecord]:
        """Fetch records that extend ``chain``: one reply of the first peer that has any."""
        async for encoded in self._replies(chain.rounds + 1, peers):
            if found := await asyncio.to_thread(verified_successors, self._manifest, encoded, chain):
                return found
        return []

    async def fetch_before(self, record: Record, first: int, peers: Sequence[str]) -> dict[int, Record]:
        """Fetch the records from round ``first`` up to the one before ``record``, by round.

        They come from the first peer that has all of them; empty if none has. No signature is verified: each record's
        hash is named by the record after it.
        """
        return {one.plan.round: one for one, _ in await self._linked_before(record, first, peers)}

    async def certified_before(self, record: Record, first: int, peers: Sequence[str]) -> list[CertifiedRecord]:
        """Fetch the same with certificates, all verified, ascending by round; empty if one is invalid."""
        found = await self._linked_before(record, first, peers)
        valid = await asyncio.to_thread(lambda: [_verified(self._manifest, encoded) for _, encoded in found])
        return [] if None in valid else found

    async def _linked_before(self, record: Record, first: int, peers: Sequence[str]) -> list[CertifiedRecord]:
        for peer in peers:
            received: list[bytes] = []
            size = 0
            while first + len(received) < record.plan.round and size < MAX_BACKFILL_BYTES:
                if not (more := await self._request(peer, first + len(received))):
                    break
                received += more
                size += sum(map(len, more))
            if found := await asyncio.to_thread(_linked, received, first, record):
                return found
        return []

    async def _replies(self, first: int, peers: Sequence[str]) -> AsyncIterator[tuple[bytes, ...]]:
        for peer in peers:
            if found := await self._request(peer, first):
                yield found

    async def _request(self, peer: str, first: int) -> tuple[bytes, ...]:
        """Request certificates from round ``first`` on; empty if ``peer`` has none or does not answer."""
        try:
            reply = await self._rpc.call(
                peer, "history", first.to_bytes(8, "little"), timeout=CALL_SECONDS, max_reply=2 * MAX_REPLY_BYTES
            )
            return msgspec.msgpack.decode(reply, type=Certificates).encoded
        except (Unreachable, Refused, Violation, msgspec.MsgspecError):
            return ()


def _linked(received: Sequence[bytes], first: int, record: Record) -> list[CertifiedRecord]:
    """Decode certificates of the rounds from ``first`` on; empty unless their hashes link up to ``record``."""
    found: list[CertifiedRecord] = []
    previous = record.plan.previous
    for number in range(record.plan.round - 1, first - 1, -1):
        try:
            one = claimed(received[number - first]).record
        except (IndexError, MalformedMessage):
            return []
        if one.hash != previous or one.plan.round != number:
            return []
        found.append((one, received[number - first]))
        previous = one.plan.previous
    return found[::-1]


def _verified(manifest: Manifest, encoded: bytes) -> Record | None:
    try:
        return certified_record(manifest, decode(Certificate, encoded))
    except (MalformedMessage, BadCertificate):
        return None
