"""The training thread: the only thread that touches x and the inner optimizer of a replica.

It takes the inner steps of a round, of the next round while this one is exchanged (overlap), and of a late joiner's
warm-up; it stops early if the node falls behind or is asked to leave.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import TypeVar

import torch

from psyche.config import Node
from psyche.data.shard_prefetch import ShardPrefetcher
from psyche.data.token_store import BadShard
from psyche.diloco.replica import LocalUpdate, Replica
from psyche.protocol.messages import Plan, RunStatus
from psyche.protocol.round_state import Phase
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog
from psyche.training.compile_trial import compile_if_it_pays
from psyche.worker.leaving import GracefulLeave
from psyche.worker.round_metrics import RoundTimer

T = TypeVar("T")

STEP_EVENT_SECONDS = 1.0
"""At most one StepDone event in this long: a laptop's log should not grow with the speed of its GPU."""


class TrainingThread:
    """One thread that runs a replica's training. The event loop waits for it only where the round requires it."""

    def __init__(
        self,
        replica: Replica,
        threads: int | None,
        leave: GracefulLeave,
        status: Callable[[], RunStatus | None],
        prefetcher: ShardPrefetcher,
        log: EventLog,
    ) -> None:
        """``threads``: PyTorch threads. ``status`` returns the latest run status. ``prefetcher`` has the shards."""
        self._replica, self._leave, self._prefetcher, self._log = replica, leave, prefetcher, log
        self.timer = RoundTimer()
        self._thread = ThreadPoolExecutor(1, "trainer", initializer=_use_threads, initargs=(threads,))
        self._early_stop = EarlyStop(status)
        self._overlap: asyncio.Task[None] | None = None
        """Takes inner steps of the next round while this one is exchanged."""
        self._warm_up: asyncio.Task[None] | None = None
        self._warmed_up = False

    async def do(self, function: Callable[..., T], *arguments: object) -> T:
        """Run ``function`` on the training thread, after everything submitted earlier."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*arguments))

    async def train(self, plan: Plan, cancelled: Callable[[], bool]) -> LocalUpdate:
        """Take the inner steps of a round and encode the update. Raises what :meth:`Replica.train` does."""
        return await self.do(self._train, plan, cancelled)

    def start_overlap(self, plan: Plan) -> None:
        """Start taking inner steps of the next round while ``plan``'s round is exchanged, as many as the run allows."""
        self._overlap = asyncio.create_task(self._train_overlap(plan))

    async def stop_overlap(self) -> None:
        """Stop taking overlap steps: the next round begins, or another state is adopted."""
        if self._overlap is not None:
            self._overlap.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._overlap
            await self.do(lambda: None)  # wait for the step that was under way
            self._overlap = None

    def start_warm_up(self) -> None:
        """Warm up the inner optimizer of a late joiner until its first round begins. Does nothing the second time.

        AdamW's moments start at zero, so its first steps are all of one size, whatever the gradients. A node that joins
        in round 1 has the learning rate's own warm-up for that; a late joiner has the time until its first round.
        """
        if not self._warmed_up:
            self._warmed_up = True
            self._warm_up = asyncio.create_task(self._run_warm_up())

    async def stop_warm_up(self) -> None:
        """Stop the warm-up after the step under way: a round begins. Raises what a step raised."""
        task, self._warm_up = self._warm_up, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await self.do(lambda: None)

    async def _run_warm_up(self) -> None:
        steps = self._replica.warm_up_steps
        await self._prefetcher.wait_prefetched()
        if steps:
            self._log.emit(events.PhaseChanged(round=self._replica.chain.rounds + 1, phase="warming"))
        for step in range(steps):
            try:
                await self.do(self._replica.warm_up, step)
            except BadShard:
                return  # the run has moved on to text that is not here yet

    async def compile(self, settings: Node) -> None:
        """Compile the model if that pays off. Called before the node joins, when no round waits for it."""
        run = self._replica.run
        steps = (run.rounds.total - self._replica.chain.rounds) * run.rounds.inner_steps

        def begin() -> None:
            self._log.emit(events.PhaseChanged(round=0, phase="compiling"))

        def inform(text: str) -> None:
            self._log.emit(events.Notice(level="info", text=text))

        await compile_if_it_pays(self._replica.engine, run, settings, steps, do=self.do, say=inform, begin=begin)

    async def close(self) -> None:
        """Wait for the submitted work, and end the thread."""
        await asyncio.to_thread(self._thread.shutdown)

    # ------------------------------------------------------------------------------ on the thread

    def _train(self, plan: Plan, cancelled: Callable[[], bool]) -> LocalUpdate:
        started = logged = last = time.monotonic()
        tokens_per_step = self._replica.run.tokens_per_step

        def on_step(step: int, loss: float, lr: float) -> None:
            nonlocal logged, last
            now = time.monotonic()
            self.timer.add_training(now - last)
            self._early_stop.record_step()
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

        def stop_early() -> bool:
            return self._leave.should_stop_training() or self._early_stop.should_stop()

        self._early_stop.begin(plan, self._replica.remaining_steps(plan))
        update = self._replica.train(plan, on_step=on_step, cancelled=cancelled, stop_early=stop_early)
        self._early_stop.record_encoded()
        return update

    async def _train_overlap(self, plan: Plan) -> None:
        while await self.do(self._overlap_step, plan):
            pass

    def _overlap_step(self, plan: Plan) -> bool:
        if self._leave.asked:
            return False
        began = time.monotonic()
        taken = self._replica.overlapped_step(plan)
        self.timer.add_training(time.monotonic() - began)
        return taken


def _use_threads(count: int | None) -> None:
    if count is not None:
        torch.set_num_threads(count)


PATIENCE = 1.1
"""How much longer than most members a node may take. Quotas leave a tenth between nodes with quota H, too."""
STEP_TIME_ROUNDS = 5
"""Rounds whose step times estimate how long this node usually takes."""


class EarlyStop:
    """Decides when a node submits a round with fewer inner steps: it slowed down, say, because a game was started.

    The steps it took count, by their tokens. It trusts the coordinator little: only that most members are done, which
    the coordinator could as well say by closing the round; and the node trains at least as long as its earlier rounds
    took. Called on the training thread, after each step.
    """

    def __init__(self, status: Callable[[], RunStatus | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._status, self._clock = status, clock
        self._usual: deque[float] = deque(maxlen=STEP_TIME_ROUNDS)
        """Seconds per step in earlier rounds."""
        self._encoding = 0.0
        """Seconds from the last step to the encoded payload, in the last round."""
        self._plan: Plan | None = None

    def begin(self, plan: Plan, steps: int) -> None:
        """Start a round of ``steps`` inner steps."""
        self._plan, self._began = plan, self._clock()
        self._last, self._longest, self._taken = self._began, 0.0, 0
        self._expected = steps * median(self._usual) if self._usual else 0.0
        self._others: float | None = None
        """Seconds that most members took, estimated when the coordinator first said that they are done."""

    def record_step(self) -> None:
        """Record that one more inner step is done."""
        now = self._clock()
        self._longest, self._last = max(self._longest, now - self._last), now
        self._taken += 1

    def should_stop(self) -> bool:
        """Return whether to submit the steps taken so far."""
        status, now = self._status(), self._clock()
        if status is None or status.plan != self._plan or status.phase != Phase.COMMITTING:
            return False  # the deadline is extended as long as no member is done
        took = now - self._began
        if took + self._longest + self._encoding > status.allowed:
            return True
        if not status.mostly_done:
            return False
        if self._others is None:
            self._others = took
        return took > PATIENCE * max(self._others, self._expected)

    def record_encoded(self) -> None:
        """Record that the payload is encoded, which ends the round's training."""
        self._encoding = self._clock() - self._last
        if self._taken:
            self._usual.append((self._last - self._began) / self._taken)
