"""How a node that is behind catches up: certified records from anybody's ledger, then the outer steps they name.

A record says what its outer step takes, by hash, so that a node needs nobody's word: it takes the same steps as those
who were there. Only where that is more to fetch than the outer state itself, or cannot be had, is the state fetched;
first the one of now, and, for a line so slow that this changes before it is here, one that members keep on disk.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from psyche.exchange.base import Wire, taken
from psyche.network.node import NetworkNode
from psyche.network.streams import Refused, Unreachable, Violation
from psyche.protocol.acceptor import Chain, plan_fault
from psyche.protocol.certificates import BadCertificate
from psyche.protocol.envelope import MalformedMessage
from psyche.protocol.messages import Certificate, Hash, Record, decode
from psyche.roles.ledger import LedgerWriter
from psyche.roles.replica import Replica
from psyche.roles.voter import Voter
from psyche.state.snapshots import Snapshots

MAX_HISTORY = 4 << 20
"""Bytes of certificates in one reply."""
CALL_SECONDS = 15.0
MAX_SNAPSHOTS = 64
MAX_OWN_HISTORY = 1 << 30


class History(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Certificates of rounds one after the other, as many as fit."""

    certificates: Annotated[tuple[bytes, ...], Meta(max_length=4096)]


class Kept(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Rounds after which a node has the outer state on disk, and its state_root."""

    states: Annotated[tuple[tuple[int, Hash], ...], Meta(max_length=MAX_SNAPSHOTS)]


async def serve_history(network: NetworkNode, ledger: LedgerWriter, snapshots: Snapshots) -> None:
    """Tell whoever asks of certified rounds, and of the states that are kept."""

    async def history(peer: str, request: bytes) -> bytes:
        first = int.from_bytes(request, "little")
        return msgspec.msgpack.encode(History(tuple(await ledger.certificates(first, MAX_HISTORY))))

    async def kept(peer: str, request: bytes) -> bytes:
        return msgspec.msgpack.encode(Kept(tuple(snapshots.states.items())[-MAX_SNAPSHOTS:]))

    await network.rpc.serve("history", history, max_request=8)
    await network.rpc.serve("snapshots", kept, max_request=0)


class CatchUp:
    """Brings a node to where the run is. ``step`` takes a record's outer step: it raises ``FetchError``."""

    def __init__(
        self,
        wire: Wire,
        voter: Voter,
        ledger: LedgerWriter,
        replica: Replica,
        step: Callable[[Record, bytes], Awaitable[None]],
    ) -> None:
        self._wire, self._voter, self._ledger, self._replica, self._step = wire, voter, ledger, replica, step

    async def recover(self) -> int:
        """Take again the steps that this node took after its last checkpoint, from its own disk; how many."""
        began = self._replica.chain.rounds
        for encoded in await self._ledger.certificates(began + 1, MAX_OWN_HISTORY):
            record, chain = self._proven(encoded, self._replica.chain), self._replica.chain
            if (
                record is None
                or plan_fault(record.plan, chain)
                or not set(taken(record)) <= set(self._wire.journal.blobs)
            ):
                break
            await self._step(record, encoded)
        return self._replica.chain.rounds - began

    async def replay(self, sources: Sequence[str], *, at_most: int | None = None) -> int:
        """Take the outer steps of the rounds that this node lacks; how many it took.

        None where more than ``at_most`` bytes would have to be fetched. Raises ``FetchError`` where something is not
        to be had any more, after the steps before that.
        """
        began, known = self._replica.chain.rounds, self._wire.journal.blobs
        while missing := await self._after(self._replica.chain, sources):
            cost = sum(size for record, _ in missing for root, size in taken(record).items() if root not in known)
            if at_most is not None and cost > at_most:
                break
            for record, encoded in missing:
                if plan_fault(record.plan, self._replica.chain) is not None:
                    return self._replica.chain.rounds - began  # this node's state is not that of the run
                await self._step(record, encoded)
        return self._replica.chain.rounds - began

    async def snapshot(self, sources: Sequence[str]) -> tuple[Record, bytes, bytes] | None:
        """The newest state that others keep on disk and a record proves: the record it follows, with its certificate,
        and its state_root."""
        for (round, root), _ in sorted((await self._kept(sources)).items(), reverse=True):
            if round <= self._replica.chain.rounds:
                break
            found = await self._history(round, sources)
            first = None if not found else self._proven(found[0])
            if first is None or first.plan.round != round or len(found) < 2:
                continue
            after = self._proven(found[1], Chain(round, first.hash, b"", 0, first.voters))
            if after is not None and after.plan.base_root == root:
                return first, found[0], root
        return None

    async def _after(self, chain: Chain, sources: Sequence[str]) -> list[tuple[Record, bytes]]:
        """Certified records that follow ``chain``, each with its certificate: as many as one source tells at once.

        Each follows from the one before, and those voted whom that one named.
        """
        following = []
        for encoded in await self._history(chain.rounds + 1, sources):
            record = self._proven(encoded, chain)
            if record is None:
                break
            following.append((record, encoded))
            chain = Chain(record.plan.round, record.hash, b"", 0, record.voters)
        return following

    def _proven(self, encoded: bytes, chain: Chain | None = None) -> Record | None:
        """The record of a certificate that holds up, and follows ``chain`` where that is given."""
        try:
            record = self._voter.prove(decode(Certificate, encoded))
        except (MalformedMessage, BadCertificate):
            return None
        if chain is None:
            return record
        follows = (record.plan.round, record.plan.previous) == (chain.rounds + 1, chain.head)
        known = record.roster > 0 or record.electorate == chain.voters
        return record if follows and known else None

    async def _history(self, first: int, sources: Sequence[str]) -> tuple[bytes, ...]:
        """Certificates from round ``first`` on, of the first source that has any."""
        for peer in sources:
            try:
                reply = await self._wire.network.rpc.call(
                    peer, "history", first.to_bytes(8, "little"), timeout=CALL_SECONDS, max_reply=2 * MAX_HISTORY
                )
                found = msgspec.msgpack.decode(reply, type=History).certificates
            except (Unreachable, Refused, Violation, msgspec.MsgspecError):
                continue
            if found:
                return found
        return ()

    async def _kept(self, sources: Sequence[str]) -> Counter[tuple[int, bytes]]:
        """States on the disks of others, by round and state_root: how many say that they have it."""

        async def ask(peer: str) -> set[tuple[int, bytes]]:
            try:
                reply = await self._wire.network.rpc.call(
                    peer, "snapshots", b"", timeout=CALL_SECONDS, max_reply=MAX_SNAPSHOTS * 64
                )
                return set(msgspec.msgpack.decode(reply, type=Kept).states)
            except (Unreachable, Refused, Violation, msgspec.MsgspecError):
                return set()

        return Counter(state for told in await asyncio.gather(*map(ask, sources)) for state in told)
