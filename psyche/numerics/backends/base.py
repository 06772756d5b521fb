"""What a backend offers, and the one that defines the others."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from psyche.numerics import outer
from psyche.numerics.codecs.base import Codec
from psyche.numerics.codecs.registry import codec


class Backend(ABC):
    """Implementations of all codecs and of the outer step that agree with PyTorch's to the bit (DESIGN §5)."""

    name: str
    """``torch``, ``native`` or ``cuda``."""
    detail: str
    """What it runs on, for people: ``AVX-512, 2 threads``."""
    device: torch.device = torch.device("cpu")
    """Where its tensors lie."""

    @abstractmethod
    def codec(self, name: str) -> Codec:
        """The codec of that name, computed here. Raises ``KeyError`` for a name that configuration would refuse."""

    @abstractmethod
    def outer_step(
        self, theta: Tensor, momentum: Tensor, gradient: Tensor, *, lr: float, mu: float, local: Tensor | None = None
    ) -> None:
        """:func:`psyche.numerics.outer.outer_step`; the new θ is also copied to ``local`` where that is given."""


class TorchBackend(Backend):
    """PyTorch: works everywhere, and is what the others are tested against."""

    name = "torch"
    detail = "PyTorch"

    def codec(self, name: str) -> Codec:
        return codec(name)

    def outer_step(
        self, theta: Tensor, momentum: Tensor, gradient: Tensor, *, lr: float, mu: float, local: Tensor | None = None
    ) -> None:
        outer.outer_step(theta, momentum, gradient, lr=lr, mu=mu)
        if local is not None:
            local.copy_(theta)
