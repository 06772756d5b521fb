"""The outer state and the step that ends a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from psyche.numerics.digest import CHUNK, BlobIndex, index_blob, rehash


@dataclass(frozen=True)
class OuterSettings:
    """Hyperparameters of the outer optimizer. Every caller of the outer step passes this one object.

    To add one: a field with a default here, the same field in ``psyche.config.Outer``, and its arithmetic in
    :func:`outer_step`. Backends with compiled kernels use PyTorch as soon as it is not at its default.
    """

    lr: float = 0.7
    """Outer learning rate η."""
    momentum: float = 0.9
    """Nesterov momentum μ."""

    @property
    def kernel_arguments(self) -> tuple[float, float] | None:
        """(η, μ) for the compiled kernels, or None where a setting that they do not implement is in use."""
        defaults = type(self)()
        others = replace(self, lr=defaults.lr, momentum=defaults.momentum)
        return (self.lr, self.momentum) if others == defaults else None


class OuterState:
    """The outer state of a run, θ and m: one contiguous fp32 tensor ``[2, n]``.

    On the CPU its memory is a blob, whose address is the ``state_root``.
    """

    def __init__(self, tensor: Tensor) -> None:
        if tensor.dtype != torch.float32 or tensor.dim() != 2 or tensor.shape[0] != 2 or not tensor.is_contiguous():
            raise ValueError("the outer state must be one contiguous fp32 tensor [2, n]")
        self.tensor = tensor

    @classmethod
    def initial(cls, theta: Tensor) -> OuterState:
        """Create the state before the first round from θ (fp32 ``[n]``, copied), with zero momentum."""
        return cls(torch.stack([theta, torch.zeros_like(theta)]))

    @property
    def theta(self) -> Tensor:
        """Parameters, ``[n]`` fp32, a view."""
        return self.tensor[0]

    @property
    def momentum(self) -> Tensor:
        """Outer momentum m, ``[n]`` fp32, a view."""
        return self.tensor[1]

    @property
    def buffer(self) -> memoryview:
        """The writable bytes of a state on the CPU, θ then m, without a copy."""
        return self.tensor.numpy().data.cast("B")

    def to(self, device: torch.device) -> OuterState:
        """This state if it is on ``device``, else a copy on it."""
        return self if self.tensor.device == device else OuterState(self.tensor.to(device))

    def index(self) -> BlobIndex:
        """Hash the state, which must be on the CPU, as a blob; ``index().root`` is the state_root."""
        return index_blob(self.buffer)

    def reindex(self, index: BlobIndex, changed: Sequence[slice]) -> BlobIndex:
        """Compute :meth:`index` from that of a state that differs only in the ranges ``changed`` of θ and m."""
        size = self.tensor.shape[1]
        chunks = {
            number
            for part in changed
            for start in (part.start, size + part.start)
            for number in range(4 * start // CHUNK, -(-4 * (start + part.stop - part.start) // CHUNK))
        }
        return rehash(index, self.buffer, sorted(chunks))

    def clone(self) -> OuterState:
        return OuterState(self.tensor.clone())


def outer_step(theta: Tensor, momentum: Tensor, gradient: Tensor, settings: OuterSettings) -> None:
    """Apply SGD with Nesterov momentum in place: m ← μm + g; θ ← θ − η(g + μm) (DiLoCo, arXiv 2311.08105, §3).

    All tensors are fp32 ``[n]``. Each operation is a separate tensor operation, so each result is rounded: ``alpha=``
    and ``addcmul`` could become a fused multiply-add on some hardware.
    """
    momentum.mul_(settings.momentum).add_(gradient)
    theta.sub_(momentum.mul(settings.momentum).add_(gradient).mul_(settings.lr))
