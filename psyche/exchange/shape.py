"""What may be in a blob of encoded slices: checked before it is fetched, and as it arrives."""

from __future__ import annotations

from dataclasses import dataclass

from psyche.numerics.codecs.base import Codec, MalformedPayload
from psyche.numerics.digest import BlobIndex


@dataclass(frozen=True)
class Shape:
    """Slices of ``counts`` parameters each, encoded by ``codec``: chunk i of the blob is slice i."""

    codec: Codec
    counts: tuple[int, ...]

    @property
    def usual_bytes(self) -> int:
        """Of an encoded slice, about."""
        return self.codec.expected_bytes(max(self.counts))

    def accept(self, index: BlobIndex) -> None:
        """Raise ``ValueError`` where a blob of this index cannot be such slices."""
        if len(index.sizes) != len(self.counts):
            raise ValueError(f"{len(index.sizes)} slices where there should be {len(self.counts)}")
        for number, (size, count) in enumerate(zip(index.sizes, self.counts, strict=True)):
            if size > self.codec.payload_bytes(count):
                raise ValueError(f"slice {number} is larger than {self.codec.name} can make it")

    def check(self, number: int, chunk: bytes) -> None:
        """Raise ``ValueError`` where slice ``number`` cannot be decoded."""
        try:
            self.codec.check(chunk, self.counts[number])
        except MalformedPayload as error:
            raise ValueError(str(error)) from None
