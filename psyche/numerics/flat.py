"""The flat space: all trained parameters as ranges of one fp32 vector (DESIGN §4)."""

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
"""Parameters. Every tensor starts on a multiple of it, so that a codec's chunk never crosses a tensor."""

SLICE = 1 << 18
"""Parameters of one slice of a payload, at least: 1 MiB of fp32, so that while payloads are added up their sum stays in
a core's cache (on 2 cores aggregation and outer step take half the time they take with 2^22)."""
MAX_SLICES = 2048
"""Of a model; a larger one has larger slices."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
"""Where the number of a layer stands in a parameter's name, in the models of ``transformers``."""


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
        import msgspec  # here: a layout is used where it is not installed (scripts/gpu_check.sh)

        return digest("layout", msgspec.msgpack.encode([(s.name, s.shape, s.start) for s in self.spans]))

    def slices(self) -> tuple[slice, ...]:
        """The ranges that payload slices cover, in order, where everything is exchanged at once."""
        return self.fragments(1)[0]

    def fragments(self, count: int) -> tuple[tuple[slice, ...], ...]:
        """The slices of each of ``count`` fragments: strided groups of layers (Streaming DiLoCo, arXiv 2501.18512, §2).

        Units are what comes before the layers, each layer, and what comes after them; unit i belongs to fragment
        i mod ``count``. Raises ``ValueError`` where there are fewer units than fragments.
        """
        units = self._units()
        if not 0 < count <= max(1, len(units)):
            raise ValueError(f"{count} fragments; this model can be cut into at most {len(units)}")
        length = slice_length(self.size)
        return tuple(tuple(_cut(_joined(units[number::count]), length)) for number in range(count))

    def _units(self) -> list[range]:
        """Ranges of whole layers, and of what stands between them, in order."""
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
        """The ranges of ``part`` that hold parameters: without the padding."""
        first = bisect_right(self.spans, part.start, key=lambda span: span.start) - 1
        for span in self.spans[max(0, first) :]:
            if span.start >= part.stop:
                return
            start, stop = max(span.start, part.start), min(span.stop, part.stop)
            if start < stop:
                yield slice(start, stop)

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


def slice_length(size: int) -> int:
    """Parameters of a slice of a model of ``size``: a power of two."""
    length = SLICE
    while length * MAX_SLICES < size:
        length *= 2
    return length


def _joined(units: Sequence[range]) -> Iterator[range]:
    """Units that touch become one."""
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
