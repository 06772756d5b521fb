"""What a newcomer does until its first round begins: inner steps from which only the inner optimizer learns.

AdamW's moments are zero at the start, so that its first steps are all of one size, whatever the gradients. Whoever is
there from round 1 on has the learning rate's own warm-up for that; who comes later has the time it waits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from psyche.data.shard_prefetch import Supply
from psyche.data.store import BadShard
from psyche.diloco.replica import Replica
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog


class WarmUp:
    """One node's, once."""

    def __init__(
        self,
        replica: Replica,
        supply: Supply,
        on_trainer: Callable[[Callable[[], None]], Awaitable[None]],
        log: EventLog,
    ) -> None:
        self._replica, self._supply, self._on_trainer, self._log = replica, supply, on_trainer, log
        self._task: asyncio.Task[None] | None = None
        self._begun = False

    def start(self) -> None:
        """Begin, unless that was done before."""
        if not self._begun:
            self._begun = True
            self._task = asyncio.create_task(self._run())

    async def halt(self) -> None:
        """A round begins: no step after the one that is under way. Raises what a step has raised."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await self._on_trainer(lambda: None)

    async def _run(self) -> None:
        steps = self._replica.warm_up_steps
        await self._supply.begun()
        if steps:
            self._log.emit(events.PhaseChanged(round=self._replica.chain.rounds + 1, phase="warming"))
        for step in range(steps):
            try:
                await self._on_trainer(lambda: self._replica.warm_up(step))  # noqa: B023  # awaited within the loop
            except BadShard:
                return  # the run has gone on, to text that is not here yet
