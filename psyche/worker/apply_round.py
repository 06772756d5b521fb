"""How a node gets from one state of the run to a later one, with all that has to keep step: replica, ledger, what is
served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from psyche.diloco.replica import Replica
from psyche.ledger.writer import LedgerWriter
from psyche.network.transport import Network
from psyche.numerics.aggregate import Gradient
from psyche.numerics.outer import OuterState
from psyche.protocol.messages import Record
from psyche.worker.state_transfer import serve_state
from psyche.worker.voter import Voter

OnTrainer = Callable[[Callable[[], None]], Awaitable[None]]
"""Runs something on the thread that trains."""


class Advance:
    """Moves a replica along the chain. The certificate of the record it moves to is the one that was seen last."""

    def __init__(
        self, replica: Replica, network: Network, ledger: LedgerWriter, voter: Voter, on_trainer: OnTrainer
    ) -> None:
        self._replica, self._network, self._ledger, self._voter = replica, network, ledger, voter
        self._on_trainer = on_trainer
        self._serve(previous=b"")

    async def step(self, record: Record, gradient: Gradient) -> None:
        """The outer step of ``record``."""
        replica, before = self._replica, self._replica.chain.state_root
        await asyncio.to_thread(replica.outer_step, record.plan.round, gradient)
        await self._on_trainer(lambda: replica.apply_record_update(record))
        await asyncio.to_thread(replica.commit_state, record)
        self._enter(record)
        self._serve(before)

    async def take_over(self, outer: OuterState, record: Record | None) -> None:
        """A state fetched from others: that after ``record``, or that before the first round."""
        replica, before = self._replica, self._replica.chain.state_root
        await self._on_trainer(lambda: replica.adopt(outer, record))
        if record is not None:
            self._enter(record)
        self._serve(before)

    def _enter(self, record: Record) -> None:
        assert self._voter.certificate is not None
        self._ledger.check()
        self._ledger.enter(self._voter.certificate, record, self._replica.chain.state_root)

    def _serve(self, previous: bytes) -> None:
        serve_state(self._network, self._replica.host, self._replica.index, previous)
