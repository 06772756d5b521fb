"""Payloads as one node holds them: what may be in a blob, which blobs it serves, and which it keeps on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf

from typing_extensions import Buffer

from psyche.exchange.payload_journal import PayloadJournal
from psyche.network.spool import Blob
from psyche.network.transport import BlobTransport, FetchError, Network
from psyche.numerics.codecs.base import Codec, MalformedPayload
from psyche.numerics.digest import BlobIndex


@dataclass(frozen=True)
class PayloadLayout:
    """The layout of a blob of encoded slices: chunk i holds ``counts[i]`` parameters encoded by ``codec``."""

    codec: Codec
    counts: tuple[int, ...]
    limit: float = inf
    """The largest root mean square of a slice's values (:func:`~psyche.exchange.rules.update_limit`)."""

    @property
    def usual_bytes(self) -> int:
        """Expected bytes of the largest encoded slice."""
        return self.codec.expected_bytes(max(self.counts))

    def check_index(self, index: BlobIndex) -> None:
        """Raise ``ValueError`` if a blob with this index cannot have this layout."""
        if len(index.sizes) != len(self.counts):
            raise ValueError(f"payload has {len(index.sizes)} slices, {len(self.counts)} expected")
        for number, (size, count) in enumerate(zip(index.sizes, self.counts, strict=True)):
            if size > (most := self.codec.payload_bytes(count)):
                raise ValueError(f"slice {number} has {size} bytes, {self.codec.name} allows at most {most}")

    def check_slice(self, number: int, chunk: bytes) -> None:
        """Raise ``ValueError`` if slice ``number`` cannot be decoded, or is larger than inner steps can make it."""
        count = self.counts[number]
        try:
            self.codec.check(chunk, count)
            square = self.codec.squared_norm(chunk, count) if self.limit < inf else 0.0
        except MalformedPayload as error:
            raise ValueError(str(error)) from None
        if not square <= count * self.limit**2:
            raise ValueError(f"slice {number} is larger than {self.limit:g} in the root mean square")


class BlobRetention:
    """Serves the blobs of this round and of the previous one, which late nodes may still fetch; drops older ones."""

    def __init__(self, blobs: BlobTransport) -> None:
        self._blobs = blobs
        self._rounds: list[list[Blob]] = [[]]

    async def put(self, parts: Sequence[Buffer]) -> Blob:
        """Serve a new blob with one chunk per part."""
        blob = await asyncio.to_thread(self._blobs.spool.put, parts)
        self._blobs.add_blob(blob)
        self.keep(blob)
        return blob

    def keep(self, blob: Blob) -> None:
        """Assign a blob that is already served to this round."""
        self._rounds[-1].append(blob)

    def next_round(self) -> None:
        """Begin another round: drop the blobs of the round before the previous one."""
        self._rounds.append([])
        for blob in self._rounds.pop(0) if len(self._rounds) > 2 else []:
            self._blobs.remove_blob(blob)
            blob.close()

    def close(self) -> None:
        """Drop all blobs."""
        self.next_round()
        self.next_round()


@dataclass(frozen=True)
class PayloadStore:
    """Shared by the exchanges of all rounds: network, served blobs, and blobs on disk."""

    network: Network
    retention: BlobRetention
    journal: PayloadJournal
    on_violation: Callable[[str, str], None]
    """Called with (PeerID, what it did) for each peer that broke the protocol."""

    @property
    def peer_id(self) -> str:
        return self.network.peer_id

    async def fetch(
        self,
        root: bytes,
        sources: Sequence[str],
        layout: PayloadLayout,
        chunks: Iterable[int] | None = None,
        *,
        size: int | None = None,
        into: Blob | None = None,
    ) -> Blob:
        """Fetch a blob of encoded slices, all or some, checked as they arrive; then serve it for two rounds.

        A blob in the journal is not fetched again. ``size``: bytes of the whole blob, where they were committed to.
        ``into``: a partly fetched blob to complete. Raises ``FetchError`` and ``BadBlob``.
        """
        if root in self.journal and (found := await asyncio.to_thread(self.journal.blob, root)) is not None:
            return found

        def accept(index: BlobIndex) -> None:
            layout.check_index(index)
            if size is not None and index.size != size:
                raise ValueError(f"payload has {index.size} bytes, {size} committed")

        try:
            blob = await self.network.blobs.fetch_blob(
                root,
                sources=sources,
                accept=accept,
                chunks=chunks,
                into=into,
                check=layout.check_slice,
                max_chunks=len(layout.counts),
                chunk_bytes=layout.usual_bytes,
                on_violation=self.on_violation,
            )
        except FetchError as error:
            if into is None and error.partial is not None:
                self.retention.keep(error.partial)
            raise
        if into is None:
            self.retention.keep(blob)
        return blob

    async def persist(self, round_number: int, blob: Blob) -> None:
        """Put ``blob``, which the outer step of ``round_number`` applies, on disk: before any vote for that step."""
        if await asyncio.to_thread(self.journal.put, round_number, blob):
            self.serve(blob.index)

    def serve(self, index: BlobIndex) -> None:
        """Serve a blob of the journal to nodes that are some rounds behind."""
        self.network.blobs.add(index, self.journal.reader(index.root))

    def discard_before(self, first: int) -> None:
        """Drop from the journal what only rounds before ``first`` applied."""
        for root in self.journal.before(first):
            self.network.blobs.remove(root, self.journal.reader(root))
            self.journal.drop(root)
