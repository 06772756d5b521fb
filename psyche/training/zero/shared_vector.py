"""A flat fp32 vector that several processes see."""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor


class SharedVector:
    """``[size]`` fp32 in anonymous shared memory: gone with the last process that has it, whatever ended that one.

    memfd and not /dev/shm, which containers limit to 64 MB and where a killed process leaves its file behind.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor = descriptor
        self.tensor: Tensor = torch.frombuffer(mmap.mmap(descriptor, 4 * size), dtype=torch.float32)

    @classmethod
    def create(cls, size: int) -> SharedVector:
        """Zeros; ``descriptor`` is what other processes inherit; :meth:`close` once they have."""
        descriptor = os.memfd_create("psyche-flat")
        os.ftruncate(descriptor, 4 * size)
        return cls(descriptor, size)

    def close(self) -> None:
        """No more process is to inherit it. The tensor keeps the memory."""
        os.close(self.descriptor)
