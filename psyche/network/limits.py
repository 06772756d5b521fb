"""Rate limits that a contributor sets, shared fairly by all transfers."""

from __future__ import annotations

import threading
import time
from collections import Counter

BURST_SECONDS = 0.05
"""How much of a limit may be used at once after a pause. More would be felt by whoever shares the line."""
QUANTUM = 1 << 16
"""Bytes that are asked for at once: what the peers' turns are made of."""


class Limiter:
    """A token bucket of ``rate`` bytes a second (None: unlimited), whose tokens peers take in turns.

    ``take`` blocks the calling thread. Among the peers that wait, the one that has taken least goes first, counting
    from when it began to wait, so that many streams of one peer get no more than the one stream of another.
    """

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self._tokens = 0.0
        self._filled = time.monotonic()
        self._turn = threading.Condition()
        self._waiting: Counter[str] = Counter()
        self._taken: dict[str, int] = {}

    def take(self, peer: str, size: int) -> float:
        """Wait until ``size`` bytes, at most QUANTUM, may be moved to or from ``peer``; the seconds that took."""
        if self.rate is None:
            return 0.0
        began = time.monotonic()
        with self._turn:
            if not self._waiting[peer]:
                floor = min((self._taken[other] for other in +self._waiting), default=0)
                self._taken[peer] = max(self._taken.get(peer, 0), floor)
            self._waiting[peer] += 1
            try:
                while (delay := self._delay(peer, size)) > 0:
                    self._turn.wait(delay)
                self._tokens -= size
                self._taken[peer] += size
            finally:
                self._waiting[peer] -= 1
                if not +self._waiting:
                    self._waiting.clear()
                    self._taken.clear()
                self._turn.notify_all()
        return time.monotonic() - began

    def _delay(self, peer: str, size: int) -> float:
        """Seconds until it may be this peer's turn; 0 if it is now."""
        assert self.rate is not None
        now = time.monotonic()
        most = max(self.rate * BURST_SECONDS, float(QUANTUM))
        self._tokens = min(self._tokens + (now - self._filled) * self.rate, most)
        self._filled = now
        least = min(self._taken[other] for other in +self._waiting)
        if self._taken[peer] > least:
            return BURST_SECONDS  # woken when whoever is first has taken
        return max(0.0, (size - self._tokens) / self.rate)


UNLIMITED = Limiter(None)
