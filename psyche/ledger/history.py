"""Keeps a ledger complete: fetches the rounds that it lacks from other nodes, in the background.

A node that joined late, or was away, fetches the state and not the history; a standby follows no rounds at all. Without
this every ledger of a run has other gaps, and adds up other credits. No peer is trusted: a record before one that is
here is linked to it by its hash, a record after it is proven by its certificate and the electorate before.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

from psyche.config import Manifest
from psyche.ledger.chain_sync import CertifiedRecord, ChainFetcher
from psyche.ledger.writer import LedgerWriter
from psyche.network.rpc import Rpc
from psyche.protocol.acceptor import Chain
from psyche.protocol.chain import claimed

BATCH = 64
"""Rounds fetched at a time: a few MB with a hundred nodes."""
PAUSE_SECONDS = 10.0
"""Between two looks at a ledger that is complete, or that nobody could complete."""
PEERS = 4
"""Peers asked at a time."""


class HistoryFetcher:
    """Fetches missing rounds into one node's ledger."""

    def __init__(
        self,
        manifest: Manifest,
        rpc: Rpc,
        ledger: LedgerWriter,
        peers: Callable[[], Awaitable[Sequence[str]]],
        *,
        follow: bool,
    ) -> None:
        """``peers`` returns the peers to ask. ``follow``: also fetch the rounds after the last one, as a coordinator
        must; a member applies those itself."""
        self._manifest, self._ledger, self._peers, self._follow = manifest, ledger, peers, follow
        self._fetcher = ChainFetcher(manifest, rpc)

    async def run(self) -> None:
        """Keep the ledger complete until cancelled."""
        while True:
            if not await self.step():
                await asyncio.sleep(PAUSE_SECONDS)

    async def step(self) -> bool:
        """Fetch one batch: before the first gap's end, or after the last round. Return whether any round came."""
        known = await self._peers()
        peers = random.sample(known, min(PEERS, len(known)))
        gaps, last = await self._ledger.extent()
        found: list[CertifiedRecord] = []
        if gaps:
            found = await self._before(gaps[-1], peers)
        elif self._follow:
            found = await self._after(last, peers)
        for record, certificate in found:
            self._ledger.fill(certificate, record)
        return bool(found)

    async def _before(self, gap: range, peers: Sequence[str]) -> list[CertifiedRecord]:
        """Fetch the last rounds of a gap, which link up to the round after it."""
        anchor = await self._ledger.held(range(gap.stop, gap.stop + 1), 1)
        record = claimed(anchor[0]).record
        return await self._fetcher.certified_before(record, max(gap.start, gap.stop - BATCH), peers)

    async def _after(self, last: int, peers: Sequence[str]) -> list[CertifiedRecord]:
        """Fetch the rounds after the last one."""
        chain = Chain(0, self._manifest.run_id, b"", 0)
        if last:
            record = claimed((await self._ledger.held(range(last, last + 1), 1))[0]).record
            chain = Chain(last, record.hash, b"", 0, record.standing, record.audit_state)
        return await self._fetcher.fetch_after(chain, peers)
