"""Leave a run, for good or for a while: submit what can be submitted of the round, within a time that is logged.

A committed payload counts only once the round is certified and the other members have fetched it, so a leaving node
stays until then. While the others still train, it goes on training, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from psyche.config import Deadlines
from psyche.protocol.messages import Plan, Record
from psyche.protocol.round_state import Phase
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog
from psyche.worker.coordinator_client import CoordinatorClient

QUICK_SECONDS = 5.0
"""Time for submitting after Ctrl-C: its user waits at the terminal."""
LEAVE_SECONDS = 3.0
MAX_REASON = 200
"""Characters of a Leave message's reason."""


class LeaveRequest:
    """Whether a node was asked to leave, and how. Set on the event loop, read on any thread."""

    def __init__(self) -> None:
        self.asked = False
        self.quickly = False
        """Leave within seconds, even if work is lost; otherwise finish the round first."""
        self.resting = ""
        """Why this node leaves only for a while, if so: it stops training and submits what it has done."""
        self.acknowledged = False
        """Whether a worker is running that acts on the request."""
        self._again = asyncio.Event()

    def ask(self, *, quickly: bool) -> bool:
        """Ask to leave; asking again can only make it quicker. Returns False if no worker runs: end the process."""
        self.asked, self.quickly, self.resting = True, self.quickly or quickly, ""
        self._again.set()
        return self.acknowledged

    def rest(self, reason: str) -> None:
        """Ask to leave and come back later. A request to leave for good stays."""
        if not self.asked:
            self.asked, self.resting = True, reason
            self._again.set()

    def renew(self) -> None:
        """Clear the request: the node has left, and rejoins."""
        self.asked, self.quickly, self.resting, self.acknowledged = False, False, "", False
        self._again.clear()

    async def wait(self) -> None:
        """Wait until the node is asked, or asked again, to leave."""
        await self._again.wait()
        self._again.clear()


class GracefulLeave:
    """Decides how long a leaving worker stays, and tells the coordinator and the log."""

    def __init__(
        self, leave_request: LeaveRequest, client: CoordinatorClient, deadlines: Deadlines, me: str, log: EventLog
    ) -> None:
        self._request, self._client, self._deadlines = leave_request, client, deadlines
        self._me, self._log = me, log
        self._plan: Plan | None = None
        """The plan of the round in progress; None between rounds."""
        self._began = 0.0
        self.failed = False
        """Whether the node leaves because of an error."""
        self._said = False
        self._committed = False
        """Whether the node has committed to its update of this round."""
        self._outcome = "it was in no round"

    @property
    def asked(self) -> bool:
        """Whether this node leaves after the round in progress."""
        return self._request.asked

    @property
    def quickly(self) -> bool:
        """Whether it leaves within seconds."""
        return self._request.quickly

    def request_leave(self) -> None:
        """Leave of its own accord after the round in progress. Called on the event loop."""
        self._request.ask(quickly=False)

    def begin_round(self, plan: Plan) -> None:
        """Note that this node trains in ``plan``'s round."""
        self._plan, self._began, self._committed = plan, time.monotonic(), False
        self._outcome = f"round {plan.round} was not finished: this node's work in it is lost"

    def record_commitment(self) -> None:
        """Note that the inner steps are done and committed to."""
        self._committed = True

    def end_round(self, record: Record | None = None) -> None:
        """Note that the round is over for this node, with ``record`` if it was certified."""
        if self._plan is None:
            return
        if record is not None:
            used = any(one.node == self._me for one in record.accepted)
            self._outcome = f"round {self._plan.round} is certified, {'with' if used else 'without'} this node's work"
        self._plan = None

    def should_stop_training(self) -> bool:
        """Return whether to submit the inner steps taken so far: the members would not wait for more."""
        plan, status = self._plan, self._client.status
        if self._request.resting:
            return True
        if not self.asked or plan is None or status is None or status.plan != plan:
            return False
        return len(plan.members) == 1 or status.phase == Phase.COMMITTING

    async def run(self, working: asyncio.Task[None]) -> None:
        """Wait to be asked to leave, then let ``working`` end by itself as long as it can still submit something."""
        self._request.acknowledged = True
        await self._request.wait()
        while not working.done():
            what, seconds = self._waits_for()
            self._log.emit(events.Leaving(round=self._plan.round if self._plan else 0, what=what, seconds=seconds))
            if not seconds:
                return
            again = asyncio.create_task(self._request.wait())
            try:
                await asyncio.wait({working, again}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                if not again.done():
                    return
            finally:
                again.cancel()

    async def send_leave(self, rounds: int, *, finished: bool) -> None:
        """Tell the coordinator, once, that this node leaves after ``rounds`` rounds."""
        if self._said:
            return
        self._said = True
        reason = "it leaves, as it was asked to" if self.asked and not self.quickly else "it was stopped"
        if self._request.resting:
            reason = f"it rests: {self._request.resting}"[:MAX_REASON]
        if self.failed:
            reason = "it has failed"
        with contextlib.suppress(Exception):  # the node leaves even if no coordinator answers
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._client.leave("the run is finished" if finished else reason, rounds)

    def log_outcome(self) -> None:
        """Log how the last round ended for this node."""
        if self.asked:
            self._log.emit(events.Left(outcome=self._outcome))

    def _waits_for(self) -> tuple[str, float]:
        """Return what the node waits for, in words, and for how many seconds at most (0: it does not wait)."""
        plan, status = self._plan, self._client.status
        if plan is None:
            return "there is nothing to submit", 0.0
        if self.quickly:
            if self._committed or self.should_stop_training():
                return f"for round {plan.round} to be certified with this node's work", QUICK_SECONDS
            return f"the other members still train round {plan.round}: this node does not wait for them", 0.0
        exchange = self._deadlines.exchange_max
        if status is not None and status.plan == plan and status.phase == Phase.CERTIFYING:
            return f"for round {plan.round} to be certified with this node's work", exchange
        training = max(0.0, self._began + self._deadlines.round_max - time.monotonic())
        done = "has submitted its work" if self._committed else "trains until the others are done"
        return f"for the end of round {plan.round}: this node {done}", training + exchange
