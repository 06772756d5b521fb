"""How long an exchange takes at least: the bytes that must cross the busiest link, over its rate."""

from __future__ import annotations

from collections.abc import Sequence

from psyche.bench.exchange.links import Link


def gather(payload: int, links: Sequence[Link], served: Sequence[int]) -> float:
    """Every peer gets everybody's payload (bytes), which whoever has it passes on. In seconds.

    ``links`` are those of all peers, ``served`` the numbers of those that are waited for. Each payload leaves its
    author once; each that is served downloads those of all others; and what they download, all uplinks together send.
    """
    others = (len(links) - 1) * payload
    first = max(_seconds(payload, link.up) for link in links)
    last = max(_seconds(others, links[number].down) for number in served)
    sent = [link.up for link in links if link.up is not None]
    together = _seconds(len(served) * others, sum(sent)) if len(sent) == len(links) else 0.0
    return max(first, last, together)


def sharded(payload: int, result: int, reducers: int, links: Sequence[Link]) -> float:
    """Each of n groups of slices goes to ``reducers`` peers (one group's is a peer's own once), and its result to all.

    ``result`` is the size of the whole aggregate, encoded (bytes). In seconds.
    """
    peers = len(links)
    moved = (reducers * (peers - 1) * payload + (peers - reducers) * result) / peers
    return max(max(_seconds(moved, link.up), _seconds(moved, link.down)) for link in links)


def all_reduce(size: int, links: Sequence[Link]) -> float:
    """A ring's or a butterfly's scatter of sums and gathering of results, ``size`` bytes in all. In seconds."""
    moved = 2 * (len(links) - 1) / len(links) * size
    return max(max(_seconds(moved, link.up), _seconds(moved, link.down)) for link in links)


def _seconds(count: float, bits: int | None) -> float:
    return 0.0 if bits is None else 8 * count / bits
