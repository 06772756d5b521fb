"""What nodes tell each other of the run's past: certified rounds from their ledgers, and the states they have on disk.

Nobody is believed: a certificate proves its record, a record the state that its round started from.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from psyche.config import Manifest
from psyche.network.node import NetworkNode
from psyche.network.rpc import Rpc
from psyche.network.streams import Refused, Unreachable, Violation
from psyche.protocol.acceptor import Chain
from psyche.protocol.certificates import BadCertificate
from psyche.protocol.envelope import MalformedMessage
from psyche.protocol.messages import Certificate, Hash, Record, decode
from psyche.roles.ledger import LedgerWriter
from psyche.roles.proofs import record_in
from psyche.state.snapshots import Snapshots

MAX_HISTORY = 4 << 20
"""Bytes of certificates in one reply; a single one may be larger."""
CALL_SECONDS = 15.0
MAX_STATES = 64
MAX_ROUND = 2**62

Proven = tuple[Record, bytes]
"""A record, and the certificate that makes it final."""


class Certificates(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Of rounds one after the other."""

    encoded: Annotated[tuple[bytes, ...], Meta(max_length=4096)]


class States(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Rounds after which a node has the outer state on disk, and its state_root."""

    kept: Annotated[tuple[tuple[int, Hash], ...], Meta(max_length=MAX_STATES)]


async def serve_history(network: NetworkNode, ledger: LedgerWriter, snapshots: Snapshots) -> None:
    """Tell whoever asks."""

    async def history(peer: str, request: bytes) -> bytes:
        first = min(int.from_bytes(request, "little"), MAX_ROUND)
        return msgspec.msgpack.encode(Certificates(tuple(await ledger.certificates(first, MAX_HISTORY))))

    async def states(peer: str, request: bytes) -> bytes:
        return msgspec.msgpack.encode(States(tuple(snapshots.states.items())[-MAX_STATES:]))

    await network.rpc.serve("history", history, max_request=8)
    await network.rpc.serve("states", states, max_request=0)


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
        if not record.roster and record.electorate != chain.voters:
            break
        found.append((record, item))
        chain = Chain(record.plan.round, record.hash, b"", 0, record.voters, record.standing)
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

    async def state(self, above: int, sources: Sequence[str]) -> tuple[Proven, bytes] | None:
        """The newest state after a round ``above`` that others have on disk and that is proven: the record of that
        round, and the state_root."""
        for round, root in sorted(await self._kept(sources), reverse=True):
            if round <= above:
                break
            async for encoded in self._told(round, sources):
                first = await asyncio.to_thread(self._start_of, round, root, encoded)
                if first is not None:
                    return (first, encoded[0]), root
        return None

    def _start_of(self, round: int, root: bytes, encoded: Sequence[bytes]) -> Record | None:
        """The record of ``round``, if the one after it says that it led to ``root``."""
        first = _proven(self._manifest, encoded[0])
        if first is None or first.plan.round != round:
            return None
        chain = Chain(round, first.hash, b"", 0, first.voters, first.standing)
        after = following(self._manifest, encoded[1:2], chain)
        return first if after and after[0][0].plan.base_root == root else None

    async def _told(self, first: int, sources: Sequence[str]) -> AsyncIterator[tuple[bytes, ...]]:
        """What each source has of the rounds from ``first`` on."""
        for peer in sources:
            try:
                reply = await self._rpc.call(
                    peer, "history", first.to_bytes(8, "little"), timeout=CALL_SECONDS, max_reply=2 * MAX_HISTORY
                )
                found = msgspec.msgpack.decode(reply, type=Certificates).encoded
            except (Unreachable, Refused, Violation, msgspec.MsgspecError):
                continue
            if found:
                yield found

    async def _kept(self, sources: Sequence[str]) -> set[tuple[int, bytes]]:
        """States on the disks of others, by round and state_root."""

        async def ask(peer: str) -> set[tuple[int, bytes]]:
            try:
                reply = await self._rpc.call(peer, "states", b"", timeout=CALL_SECONDS, max_reply=MAX_STATES * 64)
                told = msgspec.msgpack.decode(reply, type=States).kept
            except (Unreachable, Refused, Violation, msgspec.MsgspecError):
                return set()
            return {state for state in told if 0 < state[0] < MAX_ROUND}

        return {state for told in await asyncio.gather(*map(ask, sources)) for state in told}


def _proven(manifest: Manifest, encoded: bytes) -> Record | None:
    try:
        return record_in(manifest, decode(Certificate, encoded))
    except (MalformedMessage, BadCertificate):
        return None
