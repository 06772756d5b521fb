"""When a node gives back the rest of a round's inner steps: a game started, say, and the others would wait for it.

What it did counts, by its tokens. It needs to believe the coordinator little: that most others are done, which the
coordinator could as well say by closing the round; and it does at least what its own earlier rounds took.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median

from psyche.protocol.messages import Plan, RunStatus
from psyche.protocol.round_state import Phase

PATIENCE = 1.1
"""How long others wait, over what most of them took. A tenth is also what quotas leave between nodes that owe H."""
EARLIER = 5
"""Rounds that tell how long this node's steps usually take."""


class EarlyStop:
    """One node's, for one round after the other. Asked on the thread that trains, after each step."""

    def __init__(self, status: Callable[[], RunStatus | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._board, self._clock = status, clock
        self._usual: deque[float] = deque(maxlen=EARLIER)
        """Seconds a step, in earlier rounds."""
        self._encoding = 0.0
        """Seconds from the last step to the payload, in the last round."""
        self._plan: Plan | None = None

    def begin(self, plan: Plan, steps: int) -> None:
        """This node is about to take ``steps`` inner steps for ``plan``."""
        self._plan, self._began = plan, self._clock()
        self._last, self._longest, self._taken = self._began, 0.0, 0
        self._expected = steps * median(self._usual) if self._usual else 0.0
        self._others: float | None = None
        """What most of them took."""

    def stepped(self) -> None:
        """One more of them is taken."""
        now = self._clock()
        self._longest, self._last = max(self._longest, now - self._last), now
        self._taken += 1

    def enough(self) -> bool:
        """Whether the steps taken so far are to be handed in as they are."""
        status, now = self._board(), self._clock()
        if status is None or status.plan != self._plan or status.phase != Phase.COMMITTING:
            return False  # as long as nobody is done the deadline is put off
        took = now - self._began
        if took + self._longest + self._encoding > status.allowed:
            return True
        if not status.mostly_done:
            return False
        if self._others is None:
            self._others = took
        return took > PATIENCE * max(self._others, self._expected)

    def encoded(self) -> None:
        """The payload is there."""
        self._encoding = self._clock() - self._last
        if self._taken:
            self._usual.append((self._last - self._began) / self._taken)
