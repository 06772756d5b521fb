"""Several exchanges of one system as one row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from psyche.bench.exchange.measure import Exchanged, Peer
from psyche.bench.exchange.systems import System
from psyche.bench.exchange.table import Row

if TYPE_CHECKING:
    from psyche.bench.exchange.compare import Plan


def summary(plan: Plan, system: System, seen: Sequence[Exchanged]) -> Row:
    """Medians over ``seen``."""
    seconds = median(one.seconds(plan.served) for one in seen)
    payload = max(peer.done.payload_bytes for one in seen for peer in one.peers)
    ideal = system.ideal_seconds(plan.parameters, payload, plan.links, plan.served)

    def typical(of_peers: Callable[[Iterable[float]], float], value: Callable[[Peer], float | None]) -> float | None:
        """Median over exchanges of the median or maximum over peers."""
        every = [[value(peer) for peer in one.peers] for one in seen]
        known = [[found for found in some if found is not None] for some in every]
        return median(of_peers(some) for some in known) if all(known) else None

    def phase(name: str) -> float | None:
        return typical(max, lambda peer: peer.done.phases.get(name))

    return Row(
        system=system.name,
        exchange=system.exchange,
        codec=system.codec,
        peers=plan.peers,
        params=plan.parameters,
        rate_mbit=_mbit(plan.rate),
        up_mbit=_mbit(plan.up),
        slow_mbit=_mbit(plan.slow),
        repeats=len(seen),
        seconds=seconds,
        slow_seconds=None if plan.slow is None else median(one.seconds(range(plan.peers)) for one in seen),
        ideal_seconds=ideal,
        share_of_line=None if ideal is None else ideal / seconds,
        encode_seconds=phase("encode"),
        wire_seconds=phase("wire"),
        apply_seconds=phase("apply"),
        payload_bytes=payload,
        bytes_up=_whole(typical(median, lambda peer: peer.bytes_up)),
        bytes_up_max=_whole(typical(max, lambda peer: peer.bytes_up)),
        bytes_down=_whole(typical(median, lambda peer: peer.bytes_down)),
        bytes_down_max=_whole(typical(max, lambda peer: peer.bytes_down)),
        cpu_seconds=typical(max, lambda peer: peer.cpu_seconds) or 0.0,
        peak_rss_mb=(typical(max, lambda peer: peer.peak) or 0.0) / 1e6,
        rss_growth_mb=(typical(max, lambda peer: peer.growth) or 0.0) / 1e6,
        averaged=min(peer.verified.averaged for one in seen for peer in one.peers),
        relative_error=max(peer.verified.relative_error for one in seen for peer in one.peers),
        matchmaking_seconds=median(one.matchmaking_seconds for one in seen),
    )


def _mbit(bits: int | None) -> float | None:
    return None if bits is None else bits / 1e6


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
