"""The backend interface, and the PyTorch backend that defines what the others must compute."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from psyche.numerics.codecs.base import Codec
from psyche.numerics.codecs.registry import codec
from psyche.numerics.outer import OuterSettings, outer_step


class Backend(ABC):
    """An implementation of all codecs and of the outer step that agrees with PyTorch's bit for bit."""

    name: str
    """``torch``, ``native`` or ``cuda``."""
    detail: str
    """The hardware it runs on, for log lines: ``AVX-512, 2 threads``."""
    device: torch.device = torch.device("cpu")
    """The device of the tensors that it takes."""

    @abstractmethod
    def codec(self, name: str) -> Codec:
        """Return the codec ``name`` on this backend's device, in PyTorch where this backend has no implementation of
        its own.

        Raises ``KeyError`` for a name that configuration refuses.
        """

    def outer_step(
        self, theta: Tensor, momentum: Tensor, gradient: Tensor, settings: OuterSettings, local: Tensor | None = None
    ) -> None:
        """Apply :func:`psyche.numerics.outer.outer_step` in place, and copy the new θ to ``local`` if it is given.

        All tensors are ``[n]`` fp32 on :attr:`device`.
        """
        outer_step(theta, momentum, gradient, settings)
        if local is not None:
            local.copy_(theta)


class TorchBackend(Backend):
    """PyTorch: works everywhere, and defines the bits that other backends are tested against."""

    name = "torch"
    detail = "PyTorch"

    def codec(self, name: str) -> Codec:
        return codec(name)
