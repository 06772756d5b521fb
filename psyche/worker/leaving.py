"""How a node leaves, for good or for a while: it hands in what it can of its round, within a bound that it says.

A payload that was committed to is of use only once the round is closed and the others have fetched it, so who leaves
stays until the record is certified. Until the others are done, too, it can as well go on training.
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
"""What Ctrl-C allows for handing in: somebody sits there and waits."""
GOODBYE_SECONDS = 3.0
MAX_REASON = 200
"""As long as a message's reason may be."""


class LeaveRequest:
    """Whether a node was asked to leave, and how. Asked on the event loop, read on any thread."""

    def __init__(self) -> None:
        self.asked = False
        self.quickly = False
        """Within seconds, whatever is lost; else the round is finished first."""
        self.resting = ""
        """Why this node goes only for a while, if it does: it trains no more, and hands in what it has done."""
        self.acknowledged = False
        """Somebody is there who acts on it."""
        self._again = asyncio.Event()

    def ask(self, *, quickly: bool) -> bool:
        """Ask to leave; once more is only ever quicker. False where nobody is there to hear it: end the process."""
        self.asked, self.quickly, self.resting = True, self.quickly or quickly, ""
        self._again.set()
        return self.acknowledged

    def rest(self, reason: str) -> None:
        """Ask to leave and to come back later. Whoever was asked to leave for good does that."""
        if not self.asked:
            self.asked, self.resting = True, reason
            self._again.set()

    def renew(self) -> None:
        """It has left, and comes back."""
        self.asked, self.quickly, self.resting, self.acknowledged = False, False, "", False
        self._again.clear()

    async def wait(self) -> None:
        """Until it is asked, or asked once more."""
        await self._again.wait()
        self._again.clear()


class GracefulLeave:
    """A worker's way out of the run: what can still be handed in, and how long that may take."""

    def __init__(
        self, leave_request: LeaveRequest, client: CoordinatorClient, deadlines: Deadlines, me: str, log: EventLog
    ) -> None:
        self._farewell, self._client, self._deadlines = leave_request, client, deadlines
        self._me, self._log = me, log
        self._plan: Plan | None = None
        """Of the round that this node has a part in."""
        self._began = 0.0
        self.failed = False
        """Something went wrong here that this node does not survive."""
        self._said = False
        self._sealed = False
        """This node has done its inner steps of it."""
        self._outcome = "it was in no round"

    @property
    def asked(self) -> bool:
        """Whether this node is to leave after the round it is in."""
        return self._farewell.asked

    @property
    def quickly(self) -> bool:
        """Within seconds."""
        return self._farewell.quickly

    def decide(self) -> None:
        """This node leaves of its own accord, after the round it is in. On the event loop."""
        self._farewell.ask(quickly=False)

    def begin(self, plan: Plan) -> None:
        """This node trains for the round of ``plan``."""
        self._plan, self._began, self._sealed = plan, time.monotonic(), False
        self._outcome = f"round {plan.round} was not finished: what this node did in it is lost"

    def sealed(self) -> None:
        """Its inner steps are done and committed to."""
        self._sealed = True

    def end(self, record: Record | None = None) -> None:
        """The round is over for this node; ``record`` is what became of it."""
        if self._plan is None:
            return
        if record is not None:
            used = any(one.node == self._me for one in record.accepted)
            self._outcome = f"round {self._plan.round} is certified, {'with' if used else 'without'} this node's work"
        self._plan = None

    def should_stop_training(self) -> bool:
        """Whether the inner steps done so far are to be handed in as they are: nobody would wait for more of them."""
        plan, status = self._plan, self._client.status
        if self._farewell.resting:
            return True
        if not self.asked or plan is None or status is None or status.plan != plan:
            return False
        return len(plan.members) == 1 or status.phase == Phase.COMMITTING

    async def run(self, working: asyncio.Task[None]) -> None:
        """Wait to be asked to leave, then for ``working`` to end by itself while that can still hand something in."""
        self._farewell.acknowledged = True
        await self._farewell.wait()
        while not working.done():
            what, seconds = self._waits_for()
            self._log.emit(events.Leaving(round=self._plan.round if self._plan else 0, what=what, seconds=seconds))
            if not seconds:
                return
            again = asyncio.create_task(self._farewell.wait())
            try:
                await asyncio.wait({working, again}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                if not again.done():
                    return
            finally:
                again.cancel()

    async def goodbye(self, rounds: int, *, finished: bool) -> None:
        """Tell the others, once, that this node goes, which has applied so many ``rounds``."""
        if self._said:
            return
        self._said = True
        reason = "it leaves, as it was asked to" if self.asked and not self.quickly else "it was stopped"
        if self._farewell.resting:
            reason = f"it rests: {self._farewell.resting}"[:MAX_REASON]
        if self.failed:
            reason = "it has failed"
        with contextlib.suppress(Exception):  # we leave, whether anybody listens or not
            async with asyncio.timeout(GOODBYE_SECONDS):
                await self._client.leave("the run is finished" if finished else reason, rounds)

    def tell(self) -> None:
        """Say to this machine's owner how it ended."""
        if self.asked:
            self._log.emit(events.Left(outcome=self._outcome))

    def _waits_for(self) -> tuple[str, float]:
        """In words, and for how many seconds at most; 0: for nothing."""
        plan, status = self._plan, self._client.status
        if plan is None:
            return "nothing is to be handed in", 0.0
        if self.quickly:
            if self._sealed or self.should_stop_training():
                return f"for round {plan.round} to be certified with this node's work", QUICK_SECONDS
            return f"the other members still train round {plan.round}, and this node does not wait for them", 0.0
        exchange = self._deadlines.exchange_max
        if status is not None and status.plan == plan and status.phase == Phase.CERTIFYING:
            return f"for round {plan.round} to be certified with this node's work", exchange
        training = max(0.0, self._began + self._deadlines.round_max - time.monotonic())
        done = "has handed in its work" if self._sealed else "trains until the others are done"
        return f"for the end of round {plan.round}: this node {done}", training + exchange
