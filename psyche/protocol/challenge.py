"""Proof that a node has the base state it claims, without a question asked: part of it, hashed for this node and round.

The root of a state is known to everybody; the state is not. Which chunk is asked of whom follows from the round's seed,
which nobody can choose, so that a proof can neither be prepared nor be copied from another node.
"""

from __future__ import annotations

from collections.abc import Callable

from typing_extensions import Buffer

from psyche.numerics.digest import digest


def base_proof(seed: bytes, node: str, chunks: int, read: Callable[[int], Buffer]) -> bytes:
    """What ``node`` has to show in the round of ``seed``, 32 bytes. ``read(i)`` is chunk i of the outer state's blob,
    which has ``chunks`` of them."""
    drawn = digest("base-chunk", seed, node.encode())
    return digest("base-proof", seed, node.encode(), bytes(read(int.from_bytes(drawn, "little") % chunks)))
