"""One interface for both ways of exchanging a round's payloads (DESIGN §7), as one member sees it."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from psyche.exchange.journal import Journal
from psyche.exchange.merge import Merge
from psyche.exchange.shape import Shape
from psyche.exchange.shelf import BlobRetention
from psyche.network.spool import Blob
from psyche.network.transport import FetchError, Network
from psyche.numerics.aggregate import Gradient
from psyche.numerics.digest import BlobIndex
from psyche.protocol.messages import Contribution, Plan, Record, Reducing


@dataclass(frozen=True)
class BlobTransport:
    """What all rounds of a node have in common: the network, what is served, and whom liars are reported to."""

    network: Network
    shelf: BlobRetention
    journal: Journal
    me: str
    on_violation: Callable[[str, str], None]

    async def fetch(
        self,
        root: bytes,
        sources: Sequence[str],
        shape: Shape,
        chunks: Iterable[int] | None = None,
        *,
        size: int | None = None,
        into: Blob | None = None,
    ) -> Blob:
        """A blob of slices of ``shape``, all or some, checked as they arrive; served from then on for two rounds.

        What the journal has is not fetched again. ``size`` is that of the whole blob, where it was agreed on. Raises
        ``FetchError`` and ``BadBlob``.
        """
        if root in self.journal and (found := await asyncio.to_thread(self.journal.blob, root)) is not None:
            return found

        def accept(index: BlobIndex) -> None:
            shape.accept(index)
            if size is not None and index.size != size:
                raise ValueError(f"{index.size} bytes where {size} were announced")

        try:
            blob = await self.network.blobs.fetch_blob(
                root,
                sources=sources,
                accept=accept,
                chunks=chunks,
                into=into,
                check=shape.check,
                max_chunks=len(shape.counts),
                chunk_bytes=shape.usual_bytes,
                on_violation=self.on_violation,
            )
        except FetchError as error:
            if into is None and error.partial is not None:
                self.shelf.keep(error.partial)
            raise
        if into is None:
            self.shelf.keep(blob)
        return blob

    async def keep(self, round_number: int, blob: Blob) -> None:
        """Have ``blob``, which the outer step of ``round`` takes, on disk before anybody votes for that."""
        if await asyncio.to_thread(self.journal.put, round_number, blob):
            self.serve(blob.index)

    def serve(self, index: BlobIndex) -> None:
        """Serve a blob of the journal, to those who are some rounds behind."""
        self.network.blobs.add(index, self.journal.reader(index.root))

    def forget(self, first: int) -> None:
        """Drop from the journal what only rounds before ``first`` took."""
        for root in self.journal.before(first):
            self.network.blobs.remove(root, self.journal.reader(root))
            self.journal.drop(root)


def taken(record: Record) -> Mapping[bytes, int]:
    """What the outer step of ``record`` takes: roots of blobs, and how large they are, about."""
    size = max(one.contribution.payload_bytes for one in record.accepted)
    if record.results:
        return dict.fromkeys(record.results, size // len(record.results))
    return {one.contribution.payload_root: one.contribution.payload_bytes for one in record.accepted}


class Exchange(ABC):
    """One round's exchange at one member. Payloads are those of the round's fragment, a chunk for each slice."""

    def __init__(self, wire: BlobTransport, plan: Plan, shape: Shape, merge: Merge) -> None:
        self.wire, self.plan, self.shape, self.merge = wire, plan, shape, merge
        self.members = [member.node for member in plan.members]
        self.others: Sequence[str] = ()
        """Who may have what the round took besides its members, once it is over: those who followed it."""
        self.payloads: dict[str, Blob] = {}
        """Payloads by author, whole or in part; what is there of them can be decoded."""
        self.reduced: dict[int, bytes] = {}
        """Addresses of what this node has added up for the others, by group of slices."""
        self._asked: set[str] = set()

    async def offer(self, payload: Sequence[bytes]) -> None:
        """Serve this node's own payload."""
        self.payloads[self.wire.me] = await self.wire.shelf.put(payload)

    async def collect(self, author: str, given: Contribution) -> None:
        """Get what this node's part needs of a contribution's payload, from its author and whoever has it.

        Raises ``FetchError`` where nobody has it, ``BadBlob`` where its content is not what the codec allows.
        """
        self._asked.add(author)
        if author in self.held:
            return
        try:
            self.payloads[author] = await self.wire.fetch(
                given.payload_root,
                [author, *self.members, *self.others],
                self.shape,
                self.part(),
                size=given.payload_bytes,
                into=self.payloads.get(author),
            )
        except FetchError as error:
            if error.partial is not None:  # the next attempt goes on from there
                self.payloads[author] = error.partial
            raise

    @property
    def held(self) -> frozenset[str]:
        """Authors of whose payloads this node has its part."""
        part = self.part()
        return frozenset(
            author
            for author in self._asked | set(self.payloads)
            if not part or (author in self.payloads and all(map(self.payloads[author].present, part)))
        )

    def drawn(self, reducing: Reducing) -> None:
        """Take in who reduces what now. Where everybody aggregates, nobody does."""
        return

    def due(self, reducing: Reducing) -> Sequence[int]:
        """Groups that this node has to reduce and has not, and for which everything is here."""
        return ()

    async def reduce(self, reducing: Reducing, given: Mapping[str, Contribution]) -> Mapping[int, bytes]:
        """Add up the groups that are :meth:`due`, over the selected contributions; the addresses of the results."""
        return {}

    @abstractmethod
    def part(self) -> Sequence[int]:
        """The slices that this node needs of every payload."""

    @abstractmethod
    async def prepare(self, record: Record) -> Gradient:
        """Get what else the outer step of ``record`` takes; the gradient then. Raises as :meth:`collect`."""
