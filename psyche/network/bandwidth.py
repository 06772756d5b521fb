"""Bandwidth: what was transferred and how fast, per peer, and the rate limits that the node's owner sets."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass

BURST_SECONDS = 0.05
"""The share of a limit that may be used at once after a pause. Longer bursts disturb others on the same line."""
QUANTUM = 1 << 16
"""Bytes requested from a limiter at once: the unit in which peers take turns."""
SMOOTHING = 0.3
"""Weight of the newest transfer in a rate: three transfers after a line changed, two thirds of the change show."""
MEASURED_BYTES = 1 << 18
"""Shorter transfers measure latency rather than bandwidth, and set no rate."""


class Limiter:
    """A token bucket of ``rate`` bytes per second (None: unlimited) that is fair between peers. Thread-safe.

    ``take`` blocks the calling thread. Of the peers that wait, the one that has taken least since it began to wait
    goes first, so many streams of one peer get no more than the single stream of another.
    """

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self._tokens = 0.0
        self._filled = time.monotonic()
        self._turn = threading.Condition()
        self._waiting: Counter[str] = Counter()
        self._taken: dict[str, int] = {}

    def take(self, peer: str, size: int) -> float:
        """Wait until ``size`` bytes (at most QUANTUM) may move to or from ``peer``; return the seconds waited."""
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
        """Return seconds until it may be this peer's turn; 0 if it is now."""
        assert self.rate is not None
        now = time.monotonic()
        most = max(self.rate * BURST_SECONDS, float(QUANTUM))
        self._tokens = min(self._tokens + (now - self._filled) * self.rate, most)
        self._filled = now
        least = min(self._taken[other] for other in +self._waiting)
        if self._taken[peer] > least:
            return BURST_SECONDS  # notified earlier, once the peer in front has taken its bytes
        return max(0.0, (size - self._tokens) / self.rate)


UNLIMITED = Limiter(None)


@dataclass
class PeerTraffic:
    """Traffic with one peer. Rates are in bytes per second; None before the first long transfer."""

    bytes_up: int = 0
    bytes_down: int = 0
    rate_up: float | None = None
    rate_down: float | None = None


class Traffic:
    """Bytes sent and received over streams, framing included, counted locally. Thread-safe."""

    def __init__(self) -> None:
        self.bytes_up = self.bytes_down = 0
        self.peers: dict[str, PeerTraffic] = {}
        self._lock = threading.Lock()

    def up(self, peer_id: str, count: int) -> None:
        with self._lock:
            self.bytes_up += count
            self._peer(peer_id).bytes_up += count

    def down(self, peer_id: str, count: int) -> None:
        with self._lock:
            self.bytes_down += count
            self._peer(peer_id).bytes_down += count

    def measured(self, peer_id: str, *, down: bool, count: int, seconds: float) -> None:
        """Update the peer's rate with a transfer of ``count`` verified or accepted bytes that took ``seconds``."""
        if count < MEASURED_BYTES or seconds <= 0:
            return
        with self._lock:
            peer = self._peer(peer_id)
            if down:
                peer.rate_down = _smoothed(peer.rate_down, count / seconds)
            else:
                peer.rate_up = _smoothed(peer.rate_up, count / seconds)

    def _peer(self, peer_id: str) -> PeerTraffic:
        return self.peers.setdefault(peer_id, PeerTraffic())


def _smoothed(before: float | None, now: float) -> float:
    return now if before is None else before + SMOOTHING * (now - before)
