"""What nodes tell each other of the run's past: certified rounds from their ledgers.

Nobody is believed: a certificate proves its record.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from psyche.config import Manifest
from psyche.ledger.certificate_check import record_in
from psyche.ledger.writer import LedgerWriter
from psyche.network.rpc import Rpc
from psyche.network.transport import Network, Refused, Unreachable, Violation
from psyche.protocol.acceptor import Chain
from psyche.protocol.certificates import BadCertificate
from psyche.protocol.envelope import MalformedMessage
from psyche.protocol.ledger import claimed
from psyche.protocol.messages import Certificate, Record
from psyche.protocol.wire import decode

MAX_HISTORY = 4 << 20
"""Bytes of certificates in one reply; a single one may be larger."""
MAX_OLDER = 64 << 20
"""Bytes of certificates that are fetched of one source before what it tells is looked at."""
CALL_SECONDS = 15.0
MAX_ROUND = 2**62

Proven = tuple[Record, bytes]
"""A record, and the certificate that makes it final."""


class Certificates(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Of rounds one after the other."""

    encoded: Annotated[tuple[bytes, ...], Meta(max_length=4096)]


async def serve_history(network: Network, ledger: LedgerWriter) -> None:
    """Tell whoever asks."""

    async def history(peer: str, request: bytes) -> bytes:
        first = min(int.from_bytes(request, "little"), MAX_ROUND)
        return msgspec.msgpack.encode(Certificates(tuple(await ledger.certificates(first, MAX_HISTORY))))

    await network.rpc.serve("history", history, max_request=8)


def following(manifest: Manifest, encoded: Sequence[bytes], chain: Chain) -> list[Proven]:
    """Those of ``encoded`` that follow ``chain``, one after the other, up to the first that does not hold up.

    Who voted is whom the record before named. The state that a record's round started from is not held against
    ``chain``: who takes its outer step does that.
    """
    found: list[Proven] = []
    for item in encoded:
        record = _proven(manifest, item)
        if record is None or (record.plan.round, record.plan.previous) != (chain.rounds + 1, chain.head):
            break
        if not record.reconfiguration and record.electorate != chain.voters:
            break
        found.append((record, item))
        chain = Chain(record.plan.round, record.hash, b"", 0, record.voters, record.standing, record.audit_state)
    return found


class Past:
    """Asks others. Signatures are checked on a thread."""

    def __init__(self, manifest: Manifest, rpc: Rpc) -> None:
        self._manifest, self._rpc = manifest, rpc

    async def after(self, chain: Chain, sources: Sequence[str]) -> list[Proven]:
        """Records that follow ``chain``: as many as the first source that has any tells at once."""
        async for encoded in self._told(chain.rounds + 1, sources):
            if found := await asyncio.to_thread(following, self._manifest, encoded, chain):
                return found
        return []

    async def before(self, record: Record, first: int, sources: Sequence[str]) -> dict[int, Record]:
        """Records of the rounds from ``first`` to the one before ``record``, by round, from the first source that has
        them all; empty where none has. No signature is checked: each is named by its hash in the one after it."""
        for peer in sources:
            told: list[bytes] = []
            size = 0
            while first + len(told) < record.plan.round and size < MAX_OLDER:
                if not (more := await self._ask(peer, first + len(told))):
                    break
                told += more
                size += sum(map(len, more))
            if found := await asyncio.to_thread(_linked, told, first, record):
                return found
        return {}

    async def _told(self, first: int, sources: Sequence[str]) -> AsyncIterator[tuple[bytes, ...]]:
        """What each source has of the rounds from ``first`` on."""
        for peer in sources:
            if found := await self._ask(peer, first):
                yield found

    async def _ask(self, peer: str, first: int) -> tuple[bytes, ...]:
        """Certificates of the rounds from ``first`` on that ``peer`` tells at once; none where it has or says none."""
        try:
            reply = await self._rpc.call(
                peer, "history", first.to_bytes(8, "little"), timeout=CALL_SECONDS, max_reply=2 * MAX_HISTORY
            )
            return msgspec.msgpack.decode(reply, type=Certificates).encoded
        except (Unreachable, Refused, Violation, msgspec.MsgspecError):
            return ()


def _linked(told: Sequence[bytes], first: int, record: Record) -> dict[int, Record]:
    """``told``, which are of the rounds from ``first`` on, if they lead up to ``record`` without a gap."""
    found: dict[int, Record] = {}
    previous = record.plan.previous
    for number in range(record.plan.round - 1, first - 1, -1):
        try:
            one = claimed(told[number - first]).record
        except (IndexError, MalformedMessage):
            return {}
        if one.hash != previous or one.plan.round != number:
            return {}
        found[number], previous = one, one.plan.previous
    return found


def _proven(manifest: Manifest, encoded: bytes) -> Record | None:
    try:
        return record_in(manifest, decode(Certificate, encoded))
    except (MalformedMessage, BadCertificate):
        return None
