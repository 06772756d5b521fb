"""The one thread that touches a replica's tensors, and the inner steps that it takes, in a round and between rounds."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from psyche.config import Node
from psyche.diloco.replica import LocalUpdate, Replica
from psyche.protocol.messages import Plan, RunStatus
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog
from psyche.training.compile_trial import compile_if_it_pays
from psyche.worker.early_stop import EarlyStop
from psyche.worker.leaving import GracefulLeave
from psyche.worker.meter import Meter

T = TypeVar("T")

STEP_EVENT_SECONDS = 1.0
"""At most one StepDone event in this long: a laptop's log should not grow with the speed of its GPU."""


class Trainer:
    """A node's. The event loop never waits for it but where a round says so."""

    def __init__(
        self,
        replica: Replica,
        threads: int | None,
        *,
        meter: Meter,
        departure: GracefulLeave,
        status: Callable[[], RunStatus | None],
        log: EventLog,
    ) -> None:
        """``threads`` are PyTorch's; ``status`` is what the coordinator says now."""
        self._replica, self._meter, self._graceful_leave, self._log = replica, meter, departure, log
        self._thread = ThreadPoolExecutor(1, "trainer", initializer=_use_threads, initargs=(threads,))
        self._remainder = EarlyStop(status)
        self._late: asyncio.Task[None] | None = None
        """Inner steps of the next round, while this one is on the wire."""

    async def do(self, function: Callable[..., T], *arguments: object) -> T:
        """``function`` on the thread, after what it was given before."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*arguments))

    async def train(self, plan: Plan, stop: Callable[[], bool]) -> LocalUpdate:
        """The inner steps of a round, and what they are to send. Raises what :meth:`Replica.train` does."""
        return await self.do(self._train, plan, stop)

    def begin_late(self, plan: Plan) -> None:
        """Take inner steps of the next round until it begins, as many as the run allows, while ``plan``'s is on the
        wire."""
        self._late = asyncio.create_task(self._train_late(plan))

    async def halt_late(self) -> None:
        """The next round begins, or another state is taken up: no more steps on top of this one."""
        if self._late is not None:
            self._late.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._late
            await self.do(lambda: None)  # the step that was under way
            self._late = None

    async def compile(self, settings: Node) -> None:
        """Have the engine train compiled where that pays: before this node presents itself, when no round waits for
        it."""
        run = self._replica.run
        steps = (run.rounds.total - self._replica.chain.rounds) * run.rounds.inner_steps

        def begin() -> None:
            self._log.emit(events.PhaseChanged(round=0, phase="compiling"))

        def say(text: str) -> None:
            self._log.emit(events.Notice(level="info", text=text))

        await compile_if_it_pays(self._replica.engine, run, settings, steps, do=self.do, say=say, begin=begin)

    async def end(self) -> None:
        """Wait for what the thread was given, and end it."""
        await asyncio.to_thread(self._thread.shutdown)

    # ------------------------------------------------------------------------------ on the thread

    def _train(self, plan: Plan, stop: Callable[[], bool]) -> LocalUpdate:
        started = logged = last = time.monotonic()
        tokens_per_step = self._replica.run.tokens_per_step

        def progress(step: int, loss: float, lr: float) -> None:
            nonlocal logged, last
            now = time.monotonic()
            self._meter.trained(now - last)
            self._remainder.stepped()
            last = now
            if now - logged >= STEP_EVENT_SECONDS:
                logged = now
                rate = (step + 1) * tokens_per_step / (now - started)
                done = self._replica.schedule_step(plan) + step + 1
                self._log.emit(
                    events.StepDone(
                        round=plan.round, step=step + 1, global_step=done, loss=loss, lr=lr, tokens_per_second=rate
                    )
                )

        def enough() -> bool:
            return self._graceful_leave.enough() or self._remainder.enough()

        self._remainder.begin(plan, self._replica.remaining_steps(plan))
        work = self._replica.train(plan, on_step=progress, cancelled=stop, stop_early=enough)
        self._remainder.encoded()
        return work

    async def _train_late(self, plan: Plan) -> None:
        while await self.do(self._step_late, plan):
            pass

    def _step_late(self, plan: Plan) -> bool:
        if self._graceful_leave.asked:
            return False
        began = time.monotonic()
        taken = self._replica.overlapped_step(plan)
        self._meter.trained(time.monotonic() - began)
        return taken


def _use_threads(count: int | None) -> None:
    if count is not None:
        torch.set_num_threads(count)
