"""Bytes and rates, in all and by peer: counted where they pass, never taken from anybody's word."""

from __future__ import annotations

import threading
from dataclasses import dataclass

SMOOTHING = 0.3
"""Weight of the newest transfer in a rate: three transfers after a line changed, two thirds of the change are seen."""
MEASURED_BYTES = 1 << 18
"""Transfers shorter than this say more about latency than about a line, and set no rate."""


@dataclass
class PeerTraffic:
    """What passed between this node and one peer. Rates are bytes a second; None before the first long transfer."""

    bytes_up: int = 0
    bytes_down: int = 0
    rate_up: float | None = None
    rate_down: float | None = None


class Traffic:
    """Bytes sent and received over streams, framing included. Safe on any thread."""

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
        """A transfer of ``count`` verified or accepted bytes took so long."""
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
