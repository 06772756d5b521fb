"""Who gives this node files of the token store: mirrors first, which nobody waits for, then the other members."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from psyche.config import Manifest, Node
from psyche.data.index import Shard, TokenizerFile
from psyche.data.mirrors import Mirror, MirrorError, NotThere, WrongBytes
from psyche.durable import write_at
from psyche.errors import PsycheError
from psyche.network.spool import Blob
from psyche.network.transport import FetchError, Network, source_order
from psyche.numerics.digest import CHUNK, BlobIndex, chunk_count
from psyche.telemetry.formatting import peer_name

REST_SECONDS = 120.0
"""A mirror that could not be read is left alone for so long."""
ASKED = 64
"""Members that are asked for one file."""


class NotToBeHad(PsycheError):
    """Nobody could give a file."""


class ShardSources:
    """Where this node fetches files from, and what it knows of those who failed it."""

    def __init__(
        self, network: Network, mirrors: Sequence[Mirror], hosts: Sequence[str], warn: Callable[[str], None]
    ) -> None:
        """``hosts`` are PeerIDs to begin with; ``warn`` hears of mirrors that serve something else."""
        self._network, self._mirrors, self._hosts, self._warn = network, mirrors, tuple(hosts), warn
        self._liars: set[tuple[str, str]] = set()
        self._resting: dict[str, float] = {}

    def meet(self, members: Sequence[str]) -> None:
        """These peers take part now: they are the first to be asked."""
        self._hosts = tuple(members)

    async def fetch(
        self,
        wanted: Shard | TokenizerFile,
        name: str,
        into: int,
        progress: Callable[[int], None] = lambda received: None,
    ) -> str:
        """Write ``wanted``, file ``name`` of a store, to the open file ``into``; checked. Returns who gave it.

        ``progress`` hears the bytes received so far, on any thread. Raises :class:`NotToBeHad`.
        """
        reasons = []
        for mirror in self._mirrors:
            if (mirror.url, wanted.root) in self._liars or self._resting.get(mirror.url, 0.0) > time.monotonic():
                continue
            try:
                await mirror.copy(wanted, name, into, progress=progress, throttle=self._throttle(mirror.url))
                return mirror.url
            except WrongBytes as error:
                self._liars.add((mirror.url, wanted.root))
                self._warn(f"{error}: the mirror is not asked for it again")
                reasons.append(str(error))
            except MirrorError as error:
                if not isinstance(error, NotThere):
                    self._resting[mirror.url] = time.monotonic() + REST_SECONDS
                reasons.append(str(error))
        try:
            await self._from_members(wanted, name, into, progress)
            return "other members"
        except FetchError as error:
            raise NotToBeHad(f"{name} cannot be had ({'; '.join([*reasons, str(error)])})") from None

    async def _from_members(
        self, wanted: Shard | TokenizerFile, name: str, into: int, progress: Callable[[int], None]
    ) -> None:
        root, received = bytes.fromhex(wanted.root), 0

        def accept(index: BlobIndex) -> None:
            if index.size != wanted.bytes:
                raise ValueError("a blob of another size than the store's index says")

        def came(number: int, chunk: bytes) -> None:
            nonlocal received
            received += len(chunk)
            progress(received)

        known: Sequence[str] = self._hosts
        with contextlib.suppress(TimeoutError):  # a daemon too busy to say who else is there
            known = await self._network.sources(self._hosts)
        peers = source_order(known, self._network.peer_id, root)[:ASKED]
        blob = None
        try:
            blob = await self._network.blobs.fetch_blob(
                root,
                sources=peers,
                max_chunks=max(1, chunk_count(wanted.bytes)),
                accept=accept,
                chunk_bytes=CHUNK,
                check=came,
                on_violation=lambda peer, what: self._warn(f"{peer_name(peer)} serves what is not {name}: {what}"),
            )
            await asyncio.to_thread(_write, blob, into)
        except FetchError as error:
            blob = error.partial
            raise
        finally:
            if blob is not None:
                self._network.blobs.remove_blob(blob)
                blob.close()

    def _throttle(self, url: str) -> Callable[[int], None]:
        """Keeps what mirrors send within the line that this node's owner allows, and counts it."""

        def take(count: int) -> None:
            self._network.traffic.down(url, count)
            self._network.blobs.download_limit.take(url, count)

        return take


def mirrors_of(manifest: Manifest, node: Node) -> list[Mirror]:
    """This node's own mirrors, then the run's; directories are read in place and are none."""
    own = [Mirror(url, anonymous=False) for url in node.data_mirrors if "://" in url]
    return own + [Mirror(url, anonymous=True) for url in manifest.run.data.mirrors]


def _write(blob: Blob, into: int) -> None:
    for number, offset in enumerate(blob.index.offsets):
        write_at(into, blob[number], offset)
