"""Sources of the token store's files: mirrors first, which cost no member its upload, then the other members."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from psyche.config import Manifest, Node
from psyche.data.index import Shard, TokenizerFile
from psyche.data.mirrors import Mirror, MirrorError, MissingFile, WrongBytes
from psyche.durable import write_at
from psyche.errors import PsycheError
from psyche.network.spool import Blob
from psyche.network.transport import FetchError, Network, source_order
from psyche.numerics.digest import CHUNK, BlobIndex, chunk_count
from psyche.telemetry.formatting import peer_name

MIRROR_PAUSE_SECONDS = 120.0
"""Pause before a mirror that could not be read is tried again."""
MAX_SOURCES = 64
"""Members asked for one file."""


class ShardUnavailable(PsycheError):
    """No mirror and no member could provide a file."""


class ShardSources:
    """Fetches files of a token store, and remembers the mirrors that failed."""

    def __init__(
        self, network: Network, mirrors: Sequence[Mirror], members: Sequence[str], warn: Callable[[str], None]
    ) -> None:
        """``members``: PeerIDs to ask first. ``warn`` is called about sources that serve wrong bytes."""
        self._network, self._mirrors, self._members, self._warn = network, mirrors, tuple(members), warn
        self._wrong: set[tuple[str, str]] = set()
        self._paused: dict[str, float] = {}

    def set_members(self, members: Sequence[str]) -> None:
        """Set the members of the current round, which are asked first."""
        self._members = tuple(members)

    async def fetch(
        self,
        wanted: Shard | TokenizerFile,
        name: str,
        into: int,
        progress: Callable[[int], None] = lambda received: None,
    ) -> str:
        """Write ``wanted``, file ``name`` of a store, to the open file ``into``, verified; return its source's name.

        ``progress`` is called with the bytes received so far, on any thread. Raises :class:`ShardUnavailable`.
        """
        reasons = []
        for mirror in self._mirrors:
            if (mirror.url, wanted.root) in self._wrong or self._paused.get(mirror.url, 0.0) > time.monotonic():
                continue
            try:
                await mirror.copy(wanted, name, into, progress=progress, throttle=self._throttle(mirror.url))
                return mirror.url
            except WrongBytes as error:
                self._wrong.add((mirror.url, wanted.root))
                self._warn(f"{error}; this mirror is not asked for it again")
                reasons.append(str(error))
            except MirrorError as error:
                if not isinstance(error, MissingFile):
                    self._paused[mirror.url] = time.monotonic() + MIRROR_PAUSE_SECONDS
                reasons.append(str(error))
        try:
            await self._from_members(wanted, name, into, progress)
            return "other members"
        except FetchError as error:
            raise ShardUnavailable(f"no source has {name} ({'; '.join([*reasons, str(error)])})") from None

    async def _from_members(
        self, wanted: Shard | TokenizerFile, name: str, into: int, progress: Callable[[int], None]
    ) -> None:
        root, received = bytes.fromhex(wanted.root), 0

        def accept(index: BlobIndex) -> None:
            if index.size != wanted.bytes:
                raise ValueError(f"{name} has {index.size} bytes, {wanted.bytes} expected")

        def count_bytes(number: int, chunk: bytes) -> None:
            nonlocal received
            received += len(chunk)
            progress(received)

        known: Sequence[str] = self._members
        with contextlib.suppress(TimeoutError):  # the daemon is overloaded: ask the members only
            known = await self._network.sources(self._members)
        peers = source_order(known, self._network.peer_id, root)[:MAX_SOURCES]
        blob = None
        try:
            blob = await self._network.blobs.fetch_blob(
                root,
                sources=peers,
                max_chunks=max(1, chunk_count(wanted.bytes)),
                accept=accept,
                chunk_bytes=CHUNK,
                check=count_bytes,
                on_violation=lambda peer, what: self._warn(f"{peer_name(peer)} served {name} wrongly: {what}"),
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
        """Return a callback that counts a mirror's bytes and keeps them within the owner's download limit."""

        def take(count: int) -> None:
            self._network.blobs.traffic.down(url, count)
            self._network.blobs.download_limit.take(url, count)

        return take


def mirrors_of(manifest: Manifest, node: Node) -> list[Mirror]:
    """This node's own mirrors, then the run's. Local directories are read in place instead (``shard_locations``)."""
    own = [Mirror(url, anonymous=False) for url in node.data_mirrors if "://" in url]
    return own + [Mirror(url, anonymous=True) for url in manifest.run.data.mirrors]


def _write(blob: Blob, into: int) -> None:
    for number, offset in enumerate(blob.index.offsets):
        write_at(into, blob[number], offset)
