"""The flat space: all trained parameters as ranges of one fp32 vector."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from psyche.numerics.digest import digest

ALIGNMENT = 4096
"""Every tensor starts at a multiple of this many parameters, so that a codec's chunk never crosses a tensor."""

SLICE = 1 << 18
"""Minimum parameters of a payload slice: 1 MiB of fp32, so that the sum stays in a core's cache while payloads are
added (on 2 cores, aggregation and outer step take half the time that they take with 2^22)."""
MAX_SLICES = 2048
"""Maximum slices of a model; a larger model has larger slices."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
"""The layer number in a parameter name of ``transformers``."""


@dataclass(frozen=True)
class Span:
    """The range of one tensor: ``flat[start:stop]`` holds its elements; zeros pad it to a multiple of ``ALIGNMENT``."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape)


@dataclass(frozen=True)
class FlatLayout:
    """The mapping of parameter names to ranges of the flat vector, in model order. Its hash is in the manifest."""

    spans: tuple[Span, ...]

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, Sequence[int]]]) -> FlatLayout:
        """Lay out named tensors in the order given. Raises ``ValueError`` for a repeated name."""
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
        """Lay out the trained parameters of a module. Tied weights appear once, buffers not at all."""
        return cls.of((name, p.shape) for name, p in model.named_parameters() if p.requires_grad)

    @cached_property
    def size(self) -> int:
        """Elements of the flat vector, including padding."""
        return _aligned(self.spans[-1].stop) if self.spans else 0

    @cached_property
    def parameters(self) -> int:
        """Trained parameters, excluding padding."""
        return sum(prod(span.shape) for span in self.spans)

    @cached_property
    def digest(self) -> bytes:
        """A 32-byte hash of all names, shapes and positions."""
        import msgspec  # imported late: scripts/gpu_check.sh uses layouts where it is not installed

        return digest("layout", msgspec.msgpack.encode([(s.name, s.shape, s.start) for s in self.spans]))

    def slices(self) -> tuple[slice, ...]:
        """Return the ranges of payload slices, in order, where the whole model is exchanged at once."""
        return self.fragments(1)[0]

    def fragments(self, count: int) -> tuple[tuple[slice, ...], ...]:
        """Return the slices of each of ``count`` fragments: strided groups of layers (Streaming DiLoCo, arXiv
        2501.18512, §2).

        Units are each layer, and the parameters before and after the layers; unit i belongs to fragment i mod
        ``count``. Raises ``ValueError`` where there are fewer units than fragments.
        """
        units = self._units()
        if not 0 < count <= max(1, len(units)):
            raise ValueError(f"{count} fragments: this model can be split into at most {len(units)}")
        length = slice_length(self.size)
        return tuple(tuple(_cut(_joined(units[number::count]), length)) for number in range(count))

    def _units(self) -> list[range]:
        """Return the ranges of whole layers and of the parameters between them, in order."""
        units: list[tuple[str | None, range]] = []
        for span in self.spans:
            found = _LAYER.search(span.name)
            layer, stop = found[1] if found else None, _aligned(span.stop)
            if units and units[-1][0] == layer:
                units[-1] = (layer, range(units[-1][1].start, stop))
            else:
                units.append((layer, range(span.start, stop)))
        return [unit for _, unit in units]

    def within(self, part: slice) -> Iterator[slice]:
        """Yield the ranges of ``part`` without padding."""
        first = bisect_right(self.spans, part.start, key=lambda span: span.start) - 1
        for span in self.spans[max(0, first) :]:
            if span.start >= part.stop:
                return
            start, stop = max(span.start, part.start), min(span.stop, part.stop)
            if start < stop:
                yield slice(start, stop)

    def name_at(self, position: int) -> str:
        """Return the name of the tensor at a position of the flat vector."""
        return self.spans[bisect_right(self.spans, position, key=lambda span: span.start) - 1].name

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return each tensor as a view of ``flat`` (``[size]``, contiguous)."""
        return {span.name: flat[span.start : span.stop].view(span.shape) for span in self.spans}

    def gather(self, tensors: Mapping[str, Tensor], flat: Tensor) -> None:
        """Copy named tensors into ``flat`` (fp32 ``[size]``). Leaves padding unchanged."""
        for name, view in self.views(flat).items():
            view.copy_(tensors[name])


def slice_length(size: int) -> int:
    """Parameters per slice of a model of ``size`` parameters: a power of two."""
    length = SLICE
    while length * MAX_SLICES < size:
        length *= 2
    return length


def _joined(units: Sequence[range]) -> Iterator[range]:
    """Merge adjacent units."""
    start = stop = 0
    for unit in units:
        if unit.start != stop:
            if stop > start:
                yield range(start, stop)
            start = unit.start
        stop = unit.stop
    if stop > start:
        yield range(start, stop)


def _cut(runs: Iterable[range], length: int) -> Iterator[slice]:
    for run in runs:
        for start in range(run.start, run.stop, length):
            yield slice(start, min(start + length, run.stop))


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
