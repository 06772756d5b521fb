"""Documents of several sources in one order, in which every source has its share whatever its documents' sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from psyche.errors import PsycheError

T = TypeVar("T")


@dataclass
class Part(Generic[T]):
    """A source within a mixture, and how far it has been read."""

    weight: float
    open: Callable[[], Iterator[T]]
    """Read it from its start."""
    rest: Iterator[T]
    """What is still to come of this pass."""
    size: int = 0
    """Of all that was taken, in whatever unit shares are measured."""
    passes: int = 0
    """How often it was read to its end."""


def interleave(
    parts: Sequence[Part[T]], size: Callable[[T], int], stop: Literal["first_exhausted", "all_exhausted"]
) -> Iterator[tuple[int, T]]:
    """Part number and item, always of the part that is furthest behind its share; of equals, the first.

    So ``size / weight`` of two parts never differs by more than one item's size over its part's weight. ``parts``
    are moved on before an item is handed out, and say all that is needed to go on from there. Stops as
    :class:`~psyche.config.MixtureSource` has it. Raises :class:`PsycheError` for a part without items.
    """
    while True:
        number = min(range(len(parts)), key=lambda n: parts[n].size / parts[n].weight)
        part = parts[number]
        item = next(part.rest, None)
        if item is None:
            part.passes += 1
            if stop == "first_exhausted" or all(other.passes for other in parts):
                return
            part.rest = part.open()
            item = next(part.rest, None)
            if item is None:
                raise PsycheError(f"data.source.parts.{number} has no document: correct it or leave it out")
        part.size += size(item)
        yield number, item
