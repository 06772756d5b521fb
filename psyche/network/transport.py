"""The interface between psyche and whatever carries its bytes: blobs, calls, and what goes wrong with either.

Rooms above ``network`` depend on this module and on :class:`~psyche.network.rpc.Rpc`; only ``processes`` constructs
the implementation (:mod:`psyche.network.node`). Content addresses make every carrier equally trustworthy, so another
carrier is another implementation of :class:`BlobTransport`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from typing_extensions import Buffer

from psyche.errors import PsycheError
from psyche.network.bandwidth import Limiter, Traffic
from psyche.network.spool import Blob, Spool
from psyche.numerics.digest import BlobIndex, digest

if TYPE_CHECKING:
    from psyche.network.rpc import Rpc

STALL_SECONDS = 20.0
"""A transfer that moves less than 16 KiB in this time has stalled: 0.8 kB/s, a fiftieth of a slow ADSL uplink."""

ReadChunk = Callable[[int], Buffer]
"""Chunk number -> its bytes. Runs on a worker thread; raises OSError or LookupError once they are gone."""
OnViolation = Callable[[str, str], None]
"""Called with (PeerID, what it did) for each source that broke the protocol."""


class Unreachable(PsycheError):
    """A peer could not be reached, went away, or stalled. ``peer_id`` says which peer, ``reason`` what happened."""

    def __init__(self, peer_id: str, reason: str) -> None:
        super().__init__(f"peer {peer_id} {reason}")
        self.peer_id, self.reason = peer_id, reason


class Refused(Exception):
    """A peer refused a request. Request handlers raise it to refuse one.

    ``reason`` is a sentence for people; ``code``, short ASCII, is what programs compare, and empty where no program
    depends on the reason.
    """

    def __init__(self, reason: str = "", code: str = "") -> None:
        super().__init__(reason)
        self.code = code


class Busy(Refused):
    """The peer refused because of its load, before it looked at the request: a later attempt may succeed."""


class Violation(Exception):
    """A peer sent what an honest one never sends: a length over its bound, bytes that do not match their hash."""


class FetchError(PsycheError):
    """No source could provide a blob. ``reasons`` maps PeerIDs to what went wrong."""

    def __init__(self, root: bytes, reasons: dict[str, str]) -> None:
        details = (
            "; ".join(f"{peer_id} {reason}" for peer_id, reason in reasons.items()) or "no peer is known to have it"
        )
        super().__init__(f"could not fetch blob {root.hex()[:12]}: {details}")
        self.root, self.reasons = root, reasons
        self.partial: Blob | None = None
        """The chunks that :meth:`BlobTransport.fetch_blob` received, to resume from; they are served meanwhile."""


class BadBlob(FetchError):
    """The blob behind a root is not acceptable. No source is at fault, but the author of the root."""

    def __init__(self, root: bytes, fault: str) -> None:
        super().__init__(root, {})
        self.args = (fault,)


class BlobTransport(Protocol):
    """Serve content-addressed blobs to peers and fetch blobs from them, chunk by chunk."""

    spool: Spool
    """Creates the files that received and sent blobs live in."""
    traffic: Traffic
    """Bytes sent and received, in total and per peer."""
    download_limit: Limiter
    """The owner's limit on downloads; other downloads of this process (data mirrors) take from it too."""

    def add(self, index: BlobIndex, read: ReadChunk) -> None:
        """Serve a blob whose chunks ``read`` returns on demand; each is checked before it is sent.

        ``read`` may return live state: once that has changed, callers are told that the chunk is absent.
        """

    def add_unread(self, root: bytes, load: Callable[[], BlobIndex], read: ReadChunk) -> None:
        """Serve a blob that is hashed by ``load``, on a worker thread, when it is first requested.

        ``load`` raises what ``read`` may where the blob is absent or does not have this ``root``.
        """

    def add_blob(self, blob: Blob) -> None:
        """Serve a blob of the spool, including chunks that arrive later."""

    def add_bytes(self, data: bytes) -> bytes:
        """Serve a byte string and return its root. Hashes here: call it on a worker thread for large strings."""

    def remove(self, root: bytes, read: ReadChunk | None = None) -> None:
        """Undo the oldest ``add`` of a blob (with ``read``, if given). After the last it is served no more."""

    def remove_blob(self, blob: Blob) -> None:
        """Undo :meth:`add_blob`."""

    async def fetch_blob(
        self,
        root: bytes,
        *,
        sources: Sequence[str],
        max_chunks: int,
        accept: Callable[[BlobIndex], None] = lambda index: None,
        chunks: Iterable[int] | None = None,
        chunk_bytes: int | None = None,
        into: Blob | None = None,
        check: Callable[[int, bytes], None] | None = None,
        stall: float = STALL_SECONDS,
        on_violation: OnViolation | None = None,
    ) -> Blob:
        """Fetch chunks of a blob (all by default) into the spool and serve them to others as they arrive.

        ``accept`` raises ``ValueError`` to reject an index (of at most ``max_chunks``), ``check`` (on a worker thread)
        to reject a chunk's content. ``chunk_bytes``: usual size of a chunk, if known; then the first request need not
        wait for the index. ``into``: a partly fetched blob to complete. ``stall``: seconds without progress after
        which a source is given up. ``on_violation`` is called for each source that broke the protocol, also if the
        fetch succeeds.

        Raises :class:`BadBlob`, :class:`FetchError` when no source is left, and ``PsycheError`` when the disk is full.
        """

    async def fetch_bytes(
        self,
        root: bytes,
        *,
        sources: Sequence[str],
        max_size: int,
        size: int | None = None,
        stall: float = STALL_SECONDS,
        on_violation: OnViolation | None = None,
    ) -> bytearray:
        """Fetch a byte string into memory: at most ``max_size`` bytes, exactly ``size`` where that is known.

        Otherwise like :meth:`fetch_blob`, but the result is not served.
        """

    async def fetch_into(
        self,
        root: bytes,
        target: Buffer,
        *,
        sources: Sequence[str],
        order: Sequence[int] | None = None,
        received_from: Counter[str] | None = None,
        parallel: int = 4,
        stall: float = STALL_SECONDS,
        on_violation: OnViolation | None = None,
    ) -> None:
        """Fetch a blob of exactly ``target``'s size into that writable, contiguous buffer.

        ``received_from`` is increased by the bytes received from each source. After a :class:`FetchError` the received
        chunks are in ``target``; a later call whose ``received_from`` is not empty keeps those that are right.
        ``order`` lists all chunks (of ``CHUNK`` bytes) on a ring; each caller starts at a different one.
        """


class Network(Protocol):
    """One node's access to the run's network."""

    peer_id: str
    rpc: Rpc

    @property
    def blobs(self) -> BlobTransport: ...

    @property
    def traffic(self) -> Traffic:
        """Bytes of calls and blobs, in both directions."""

    def prefer(self, preferred: Callable[[str], bool]) -> None:
        """Serve peers for which ``preferred`` is true before all others."""

    async def addresses(self) -> list[str]:
        """Multiaddresses at which others can reach this node, each ending in ``/p2p/<PeerID>``; loopback last."""

    async def connected(self) -> dict[str, list[str]]:
        """Peers connected now: PeerID -> remote ends of the connections, which others may not be able to dial.

        Raises :class:`PsycheError`, or TimeoutError where the daemon is overloaded.
        """

    async def sources(self, first: Sequence[str]) -> list[str]:
        """PeerIDs to ask for content-addressed data: ``first``, then every announced peer; connected peers lead."""


def source_order(sources: Sequence[str], caller: str, root: bytes, *, keep_first: bool = False) -> list[str]:
    """Return the order in which ``caller`` tries the sources of a blob: each but itself once, from a caller-specific
    start.

    So the load of many callers spreads. With ``keep_first`` the first source, a blob's author, stays in front.
    """
    unique = [peer_id for peer_id in dict.fromkeys(sources) if peer_id != caller]
    first, others = (unique[:1], unique[1:]) if keep_first and sources[0] != caller else ([], unique)
    if not others:
        return first
    start = int.from_bytes(digest("fetch order", caller.encode(), root)[:8], "big") % len(others)
    return [*first, *others[start:], *others[:start]]
