"""What this node serves of its rounds: the blobs of this one, and of the one before, which others may still fetch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from typing_extensions import Buffer

from psyche.network.spool import Blob
from psyche.network.transport import Network


class BlobRetention:
    """Blobs by the round they came with; those of two rounds ago are neither served nor kept."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._rounds: list[list[Blob]] = [[]]

    async def put(self, parts: Sequence[Buffer]) -> Blob:
        """Serve a new blob with a chunk for each part."""
        blob = await asyncio.to_thread(self._network.blobs.spool.put, parts)
        self._network.blobs.add_blob(blob)
        self.keep(blob)
        return blob

    def keep(self, blob: Blob) -> None:
        """A blob that is served already belongs to this round."""
        self._rounds[-1].append(blob)

    def next_round(self) -> None:
        """Another round begins."""
        self._rounds.append([])
        for blob in self._rounds.pop(0) if len(self._rounds) > 2 else []:
            self._network.blobs.remove_blob(blob)
            blob.close()

    def close(self) -> None:
        """Serve nothing any more."""
        self.next_round()
        self.next_round()
