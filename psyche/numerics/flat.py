"""The flat space: all trained parameters as ranges of one fp32 vector (DESIGN §4)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import msgspec
import torch
from torch import Tensor

from psyche.numerics.digest import digest

ALIGNMENT = 4096
"""Parameters. Every tensor starts on a multiple of it, so that a codec's chunk never crosses a tensor."""

SLICE = 1 << 22
"""Parameters of one slice of a payload (16 MiB of fp32), a multiple of ``ALIGNMENT``."""


@dataclass(frozen=True)
class Span:
    """Where one tensor lies: ``flat[start:stop]`` holds its elements; zeros follow up to the next multiple."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape)


@dataclass(frozen=True)
class FlatLayout:
    """Names to ranges of the flat vector, in the model's own parameter order. Its hash is in the manifest."""

    spans: tuple[Span, ...]

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, Sequence[int]]]) -> FlatLayout:
        """Lay out named tensors in the order given. Raises ``ValueError`` on a name that repeats."""
        spans: list[Span] = []
        start = 0
        for name, shape in shapes:
            span = Span(name, tuple(shape), start)
            spans.append(span)
            start = _aligned(span.stop)
        if len({span.name for span in spans}) != len(spans):
            raise ValueError("parameter names repeat")
        return cls(tuple(spans))

    @classmethod
    def of_model(cls, model: torch.nn.Module) -> FlatLayout:
        """The layout of a module's trained parameters. Tied weights appear once; buffers do not appear."""
        return cls.of((name, p.shape) for name, p in model.named_parameters() if p.requires_grad)

    @cached_property
    def size(self) -> int:
        """Elements of the flat vector, padding included."""
        return _aligned(self.spans[-1].stop) if self.spans else 0

    @cached_property
    def parameters(self) -> int:
        """Trained parameters, padding not included."""
        return sum(prod(span.shape) for span in self.spans)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that two layouts share only if every name, shape and position is the same."""
        return digest("layout", msgspec.msgpack.encode([(s.name, s.shape, s.start) for s in self.spans]))

    def slices(self) -> Iterator[slice]:
        """The ranges that payload slices cover, in order."""
        for start in range(0, self.size, SLICE):
            yield slice(start, min(start + SLICE, self.size))

    def name_at(self, position: int) -> str:
        """The tensor that position ``position`` of the flat vector belongs to."""
        return self.spans[bisect_right(self.spans, position, key=lambda span: span.start) - 1].name

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each tensor as a view of ``flat`` (``[size]``, contiguous)."""
        return {span.name: flat[span.start : span.stop].view(span.shape) for span in self.spans}

    def gather(self, tensors: Mapping[str, Tensor], flat: Tensor) -> None:
        """Copy named tensors into ``flat`` (``[size]``, fp32). Padding is left as it is."""
        for name, view in self.views(flat).items():
            view.copy_(tensors[name])


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
