"""The run manifest (DESIGN §2): the run, what its launch resolved, and the hash that is its identity."""

from __future__ import annotations

from typing import Annotated, Self

import msgspec
from pydantic import Field

from psyche.config.base import Count, HexDigest, PeerId, Strict, validated
from psyche.config.run import Run
from psyche.errors import ConfigError
from psyche.numerics.digest import digest

MANIFEST = "manifest.msgpack"
"""The run manifest in the directory of each of its processes."""


class Resolved(Strict):
    """What a launch adds: facts that follow from the rest but that a joiner must be able to check."""

    coordinators: Annotated[tuple[PeerId, ...], Field(min_length=1, strict=False)]
    store: HexDigest
    """Root of the token store's index (the training split's shards, the held-out shards, the tokenizer)."""
    layout: HexDigest
    genesis: HexDigest
    """state_root before the first round."""
    parameters: Count
    flat_size: Count
    """Elements of the flat vector; with the codec it fixes the sizes of all payloads."""


class Manifest(Strict):
    """The run manifest (DESIGN §2): the run, and what its launch resolved."""

    run: Run
    resolved: Resolved

    def encode(self) -> bytes:
        """Canonical msgpack: keys sorted, defaults written out. Equal manifests give equal bytes."""
        return msgspec.msgpack.encode(self.model_dump(mode="json"), order="sorted")

    @property
    def run_id(self) -> bytes:
        """32 bytes; the identity of the run everywhere."""
        return digest("manifest", self.encode())

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Inverse of :meth:`encode`. Raises :class:`ConfigError` on anything else."""
        try:
            tree = msgspec.msgpack.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"the run manifest is not valid msgpack: {error}") from None
        manifest = validated(cls, tree, "the run manifest")
        if manifest.encode() != data:
            raise ConfigError("the run manifest is not in canonical form; its author runs another version of psyche")
        return manifest
