"""One exchange of one system: begun, watched and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psyche.bench.exchange.crew import Crew
from psyche.bench.exchange.gauges import Sockets, Usage, cpu_seconds, moved, peaks, sockets, tree
from psyche.bench.exchange.talk import Done, Exchange, Prepare, Ready, Verified, Verify


@dataclass(frozen=True)
class Peer:
    """What one exchange was like for one peer."""

    done: Done
    verified: Verified
    cpu_seconds: float
    peak: int
    """Bytes."""
    growth: int
    """Bytes."""
    bytes_up: int | None
    bytes_down: int | None


@dataclass(frozen=True)
class Exchanged:
    """One exchange, peer by peer."""

    peers: Sequence[Peer]
    matchmaking_seconds: float

    def seconds(self, numbers: Sequence[int]) -> float:
        """From the first peer's begin until the last of the peers ``numbers`` is done."""
        return max(self.peers[n].done.ended for n in numbers) - min(peer.done.began for peer in self.peers)


def measured(crew: Crew) -> Exchanged:
    """One exchange. Raises :class:`PsycheError` where it fails."""
    ready = crew.ask(Prepare(), Ready)
    pids = [tree(child.process.pid) for child in crew.members]
    linked = _sockets(crew, pids)
    before = [Usage.of(some) for some in pids]
    done = crew.ask(Exchange(), Done)
    spent = [cpu_seconds(some) for some in pids]
    highest = [peaks(some) for some in pids]
    linked_after = _sockets(crew, pids)
    verified = crew.ask(Verify(crew.names), Verified)
    peers = []
    for number, usage in enumerate(before):
        growth = sum(max(0, peak - usage.resident[pid]) for pid, peak in highest[number].items())
        traffic = moved(linked[number], linked_after[number])
        peers.append(
            Peer(
                done=done[number],
                verified=verified[number],
                cpu_seconds=spent[number] - usage.cpu_seconds,
                peak=usage.proportional + growth,
                growth=growth,
                bytes_up=None if traffic is None else traffic[0],
                bytes_down=None if traffic is None else traffic[1],
            )
        )
    return Exchanged(peers, max(one.seconds for one in ready))


def _sockets(crew: Crew, pids: Sequence[Sequence[int]]) -> list[Sockets | None]:
    return [sockets(child.place, some) for child, some in zip(crew.members, pids, strict=True)]
