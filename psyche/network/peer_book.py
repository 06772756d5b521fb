"""The peer book: peers that a node was connected to, through which it rejoins when its invite's addresses are dead.

The file is trusted only for where to dial: each address contains a PeerID, and the TLS handshake verifies it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from psyche.durable import write_durably
from psyche.errors import PsycheError
from psyche.network.address import MAX_ADDRESS, MAX_ADDRESSES, is_loopback, peer_of

if TYPE_CHECKING:
    from psyche.network.node import NetworkNode

PEERS = "peers.json"
MAX_PEERS = 32
ANNOUNCED = 4
"""Addresses kept of those that a peer announces itself."""
DIALLED = 2
"""Addresses kept of those that worked before: a peer behind a forwarded port may not know its public address."""
MAX_BYTES = 2 * MAX_PEERS * (ANNOUNCED + DIALLED) * MAX_ADDRESS
FIRST_SAVE_SECONDS = 2.0
"""Pause before a new node first saves its book. The pause doubles each time, up to SAVE_SECONDS."""
SAVE_SECONDS = 40.0

log = logging.getLogger(__name__)


class KnownPeer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A peer's addresses, and the Unix times (seconds) when it was first and last connected."""

    addresses: tuple[str, ...]
    first_seen: float
    last_seen: float


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    own: tuple[str, ...]
    peers: dict[str, KnownPeer]


class PeerBook:
    """At most MAX_PEERS peers and their addresses, in a file; ``own`` holds this node's addresses when it last ran."""

    def __init__(self, path: Path) -> None:
        """Read ``path``. Damaged or invalid entries are dropped: discovery can find those peers again."""
        self.path = path
        self.own: tuple[str, ...] = ()
        self.peers: dict[str, KnownPeer] = {}
        try:
            with path.open("rb") as file:
                found = msgspec.json.decode(file.read(MAX_BYTES), type=_File)
        except OSError:
            return
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            log.warning("ignoring the damaged peer book %s: %s", path, error)
            return
        self.own = found.own[:MAX_ADDRESSES] if all(map(_peer_or_none, found.own)) else ()
        for peer_id, known in list(found.peers.items())[:MAX_PEERS]:
            good = tuple(text for text in known.addresses if _peer_or_none(text) == peer_id)
            if good:
                self.peers[peer_id] = msgspec.structs.replace(known, addresses=good[: ANNOUNCED + DIALLED])

    def addresses(self) -> list[str]:
        """Addresses to dial: the best one of each peer, then the second best of each, and so on."""
        return interleaved(self.by_peer())

    def by_peer(self) -> list[tuple[str, ...]]:
        """Return the addresses of each peer; the most recently seen peer comes first."""
        return [self.peers[peer_id].addresses for peer_id in self._ranking()]

    def update(
        self, connected: Mapping[str, Sequence[str]], announced: Mapping[str, Sequence[str]], dialled: Sequence[str]
    ) -> None:
        """Record the peers ``connected`` now (PeerID -> remote ends of its connections).

        ``announced`` maps PeerIDs to announced addresses; ``dialled`` are the addresses tried at the start.
        """
        now = time.time()
        for peer_id, ends in connected.items():
            before = self.peers.get(peer_id)
            claimed = list(dict.fromkeys(announced.get(peer_id, ())))[:ANNOUNCED]
            tried = [
                *(before.addresses if before else ()),
                *(text for text in dialled if _peer_or_none(text) == peer_id),
            ]
            others = [text for text in dict.fromkeys(tried) if text not in claimed]
            works = {f"{end}/p2p/{peer_id}" for end in ends}
            chosen = sorted([*claimed, *sorted(others, key=lambda text: text not in works)[:DIALLED]],
                            key=lambda text: (text not in works, is_loopback(text)))  # fmt: skip
            if chosen:
                self.peers[peer_id] = KnownPeer(tuple(chosen), before.first_seen if before else now, now)
        self.peers = {known_id: self.peers[known_id] for known_id in self._ranking()[:MAX_PEERS]}

    def save(self) -> None:
        """Write the file; on a disk error only log a warning, because training can go on without it."""
        try:
            write_durably(self.path, msgspec.json.format(msgspec.json.encode(_File(self.own, self.peers))))
        except OSError as error:
            log.warning("cannot write %s: %s", self.path, error)

    def _ranking(self) -> list[str]:
        """PeerIDs by last contact, then by length of acquaintance: a crowd of newcomers cannot evict live peers."""
        return sorted(self.peers, key=lambda peer_id: (-self.peers[peer_id].last_seen, self.peers[peer_id].first_seen))


async def maintain_peer_book(network: NetworkNode, book: PeerBook, dialled: Sequence[str]) -> None:
    """Keep ``book`` up to date until cancelled; a node that has lost all peers dials those in the book again.

    ``dialled`` are the addresses that the node was started with.
    """
    pause = FIRST_SAVE_SECONDS
    while True:
        await asyncio.sleep(pause)
        pause = min(2 * pause, SAVE_SECONDS)
        with contextlib.suppress(PsycheError, TimeoutError):  # the daemon is busy, or has ended (noticed elsewhere)
            book.own = tuple((await network.addresses())[:MAX_ADDRESSES])
            connected = await network.connected()
            if connected:
                book.update(connected, await network.discovery.announced(), dialled)
            else:
                await network.connect([*dialled, *book.addresses()])
            await asyncio.to_thread(book.save)


def interleaved(lists: Iterable[Sequence[str]]) -> list[str]:
    """Return the first of each list, then the second of each, and so on."""
    return [text for rank in zip_longest(*lists) for text in rank if text is not None]


def _peer_or_none(text: str) -> str | None:
    try:
        return peer_of(text)
    except ValueError:
        return None
