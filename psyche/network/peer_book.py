"""The peers that a node has been connected to: it comes back through them when its invite's addresses are dead.

The file is believed in nothing but where to dial: a PeerID is part of each address, and the TLS handshake proves it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import msgspec

from psyche.durable import write_durably
from psyche.errors import PsycheError
from psyche.network.address import MAX_ADDRESS, is_loopback, peer_of
from psyche.network.invite import MAX_ADDRESSES
from psyche.network.node import NetworkNode
from psyche.network.presence import REPEAT_SECONDS, announced

PEERS = "peers.json"
MAX_PEERS = 32
ANNOUNCED = 4
"""Addresses kept of what a peer announces of itself."""
DIALLED = 2
"""And of those it was known under before: behind a forwarded port it may not know the one that works."""
MAX_BYTES = 2 * MAX_PEERS * (ANNOUNCED + DIALLED) * MAX_ADDRESS
FIRST_SECONDS = 2.0
"""Until a new node first writes down whom it met; then twice as long, and so on, up to REPEAT_SECONDS."""

log = logging.getLogger(__name__)


class Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A peer: where it was, and in Unix seconds since when it is known and when it was last connected."""

    addresses: tuple[str, ...]
    since: float
    seen: float


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    own: tuple[str, ...]
    peers: dict[str, Known]


class PeerBook:
    """At most MAX_PEERS peers and their addresses, in a file; ``own`` are this node's, when it last ran."""

    def __init__(self, path: Path) -> None:
        """Read ``path``. What is damaged or not valid is left out: nothing is lost that cannot be found again."""
        self.path = path
        self.own: tuple[str, ...] = ()
        self.peers: dict[str, Known] = {}
        try:
            with path.open("rb") as file:
                found = msgspec.json.decode(file.read(MAX_BYTES), type=_File)
        except OSError:
            return
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            log.warning("%s is damaged and not used: %s", path, error)
            return
        self.own = found.own[:MAX_ADDRESSES] if all(map(_peer_or_none, found.own)) else ()
        for peer_id, known in list(found.peers.items())[:MAX_PEERS]:
            good = tuple(text for text in known.addresses if _peer_or_none(text) == peer_id)
            if good:
                self.peers[peer_id] = msgspec.structs.replace(known, addresses=good[: ANNOUNCED + DIALLED])

    def addresses(self) -> list[str]:
        """Where to dial: the best address of each peer, then the second best of each, and so on."""
        return in_turns(self.by_peer())

    def by_peer(self) -> list[tuple[str, ...]]:
        """The addresses of each peer, those first that were there last."""
        return [self.peers[peer_id].addresses for peer_id in self._ranking()]

    def update(
        self, connected: Mapping[str, Sequence[str]], where: Mapping[str, Sequence[str]], dialled: Sequence[str]
    ) -> None:
        """Note those that are ``connected`` now (PeerID -> far ends of its connections).

        ``where`` is what peers announce of themselves, ``dialled`` are addresses that were tried at the start.
        """
        now = time.time()
        for peer_id, ends in connected.items():
            before = self.peers.get(peer_id)
            claimed = list(dict.fromkeys(where.get(peer_id, ())))[:ANNOUNCED]
            tried = [
                *(before.addresses if before else ()),
                *(text for text in dialled if _peer_or_none(text) == peer_id),
            ]
            others = [text for text in dict.fromkeys(tried) if text not in claimed]
            works = {f"{end}/p2p/{peer_id}" for end in ends}
            chosen = sorted([*claimed, *sorted(others, key=lambda text: text not in works)[:DIALLED]],
                            key=lambda text: (text not in works, is_loopback(text)))  # fmt: skip
            if chosen:
                self.peers[peer_id] = Known(tuple(chosen), before.since if before else now, now)
        self.peers = {known_id: self.peers[known_id] for known_id in self._ranking()[:MAX_PEERS]}

    def save(self) -> None:
        """Write the file. A disk that does not take it is no reason to stop training."""
        try:
            write_durably(self.path, msgspec.json.format(msgspec.json.encode(_File(self.own, self.peers))))
        except OSError as error:
            log.warning("cannot write %s: %s", self.path, error)

    def _ranking(self) -> list[str]:
        """Who was seen last comes first, and of those seen together who is known longest: a crowd of newcomers cannot
        push out peers that are still there."""
        return sorted(self.peers, key=lambda peer_id: (-self.peers[peer_id].seen, self.peers[peer_id].since))


async def remember(network: NetworkNode, book: PeerBook, dialled: Sequence[str]) -> None:
    """Keep ``book`` up to date until cancelled; a node that has lost everybody dials its peers again.

    ``dialled`` are the addresses that the node was started with.
    """
    pause = FIRST_SECONDS
    while True:
        await asyncio.sleep(pause)
        pause = min(2 * pause, REPEAT_SECONDS)
        with contextlib.suppress(
            PsycheError, TimeoutError
        ):  # a daemon too busy to answer; or gone, which others notice
            book.own = tuple((await network.addresses())[:MAX_ADDRESSES])
            connected = await network.connected()
            if connected:
                book.update(connected, await announced(network), dialled)
            else:
                await network.connect([*dialled, *book.addresses()])
            await asyncio.to_thread(book.save)


def in_turns(lists: Iterable[Sequence[str]]) -> list[str]:
    """The first of each list, then the second of each, and so on."""
    return [text for rank in zip_longest(*lists) for text in rank if text is not None]


def _peer_or_none(text: str) -> str | None:
    try:
        return peer_of(text)
    except ValueError:
        return None
