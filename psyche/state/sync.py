"""The outer state as a blob: every member serves its own, a joiner fetches it and checks it chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from psyche.network.fetch import fetch_into
from psyche.network.node import NetworkNode
from psyche.numerics.digest import BlobIndex, chunked
from psyche.numerics.outer import OuterState


def serve_state(network: NetworkNode, outer: OuterState, index: BlobIndex, previous: bytes) -> None:
    """Serve ``outer`` as it is now, whose chunk hashes are ``index``, in place of what was served as ``previous``.

    Chunks are read from live memory; the server checks each before sending, and answers "gone" once the next
    outer step has changed it.
    """
    if previous != index.root:
        network.blobs.remove(previous)
    network.blobs.add(index, list(chunked(outer.buffer)).__getitem__)


async def fetch_state(
    network: NetworkNode, root: bytes, size: int, sources: Sequence[str]
) -> tuple[OuterState, dict[str, int]]:
    """The outer state whose state_root is ``root``, for a flat vector of ``size``, and the bytes each source gave.

    Raises ``FetchError``.
    """
    outer = OuterState(torch.empty(2, size))
    return outer, await fetch_into(network, root, outer.buffer, sources=sources)
