"""A flat fp32 vector in memory shared by several processes."""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor


class SharedVector:
    """fp32 ``[size]`` in anonymous shared memory, freed when the last process that maps it ends, however it ends.

    Uses memfd instead of /dev/shm, which containers limit to 64 MB and where a killed process leaves its file behind.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor = descriptor
        self.tensor: Tensor = torch.frombuffer(mmap.mmap(descriptor, 4 * size), dtype=torch.float32)

    @classmethod
    def create(cls, size: int) -> SharedVector:
        """Create a vector of zeros. Other processes inherit ``descriptor``; call :meth:`close` when they have it."""
        descriptor = os.memfd_create("psyche-flat")
        os.ftruncate(descriptor, 4 * size)
        return cls(descriptor, size)

    def close(self) -> None:
        """Close the descriptor. The tensor keeps the memory mapped."""
        os.close(self.descriptor)
