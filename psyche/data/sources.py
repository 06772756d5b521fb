"""Sources of documents: files, datasets with filters, mixtures.

A document is one non-empty string; the order is the same every time.
"""

from __future__ import annotations

import glob
import operator
import platform
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar

from psyche.config import Filter, HubSource, MixturePart, MixtureSource, Source, StdlibSource, TextSource
from psyche.config.data_config import SPLIT, SingleSource
from psyche.errors import PsycheError

MAX_FILE_BYTES = 64 << 20
"""Largest document: it is in memory while it is encoded."""

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_LOCAL = ("_sysconfigdata", "sitecustomize", "usercustomize", "python-config")

T = TypeVar("T")

_OPERATORS: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda found, values: found in values,
    "not in": lambda found, values: found not in values,
    "min_length": lambda found, length: len(found) >= length,
    "max_length": lambda found, length: len(found) <= length,
}


def documents(source: Source, max_documents: int | None) -> Iterator[str]:
    """Yield the first ``max_documents`` documents of ``source`` (all if None), read on demand.

    A mixture is weighed by characters, since there are no tokens yet. Raises :class:`PsycheError` where
    nothing matches, a file or column cannot be read, or a dataset does not load.
    """
    specs, stop = parts_of(source)
    parts = [Part(spec.weight, partial(_texts, spec.source), _texts(spec.source)) for spec in specs]
    return islice((text for _, text in interleave(parts, len, stop)), max_documents)


def parts_of(source: Source) -> tuple[tuple[MixturePart, ...], Literal["first_exhausted", "all_exhausted"]]:
    """Return the parts of a mixture and its stopping rule; any other source is a mixture of one part."""
    if isinstance(source, MixtureSource):
        return source.parts, source.stop
    return (MixturePart(weight=1.0, source=source),), "first_exhausted"


def local_references(source: Source) -> list[str]:
    """Return what ``source`` refers to on this machine: the interpreter's version, absolute paths of relative ones."""
    match source:
        case StdlibSource():
            return [platform.python_version()]
        case TextSource(paths=paths):
            return [str(Path(path).expanduser().absolute()) for path in paths]
        case HubSource(path=path):
            return [
                absolute(path),
                absolute(source.data_dir or ""),
                *map(_absolute_pattern, _listed(source.data_files)),
            ]
        case MixtureSource(parts=parts):
            return [meaning for part in parts for meaning in local_references(part.source)]


def absolute(name: str) -> str:
    """Return the absolute path of an existing file or directory; any other name (on a hub) unchanged."""
    return str(Path(name).absolute()) if name and Path(name).exists() else name


def _absolute_pattern(files: str) -> str:
    return files if "://" in files else str(Path(files).absolute())


def _listed(files: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (files,) if isinstance(files, str) else files or ()


def _texts(source: SingleSource) -> Iterator[str]:
    """Yield every non-empty document."""
    match source:
        case StdlibSource():
            texts = _stdlib()
        case TextSource():
            texts = _text(source)
        case HubSource():
            texts = _dataset(source)
    return filter(None, texts)


def _stdlib() -> Iterator[str]:
    """Library modules only: some distributions omit the tests, and build configuration contains machine names."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in _sorted_below(root, root.rglob("*.py")):
        if _NOT_LIBRARY.isdisjoint(path.relative_to(root).parts) and not path.name.startswith(_LOCAL):
            try:
                yield path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue  # a few modules use other encodings on purpose


def _text(source: TextSource) -> Iterator[str]:
    for path in _files(source.paths):
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise PsycheError(
                    f"{path} is one document of more than {MAX_FILE_BYTES >> 20} MiB: split it, or read it line by "
                    f"line with data.source {{kind: dataset, path: text, data_files: {path}}}"
                )
            yield path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise PsycheError(
                f"{path} is not UTF-8 text (byte {error.start}): convert it or leave it out of data.source.paths"
            ) from None
        except OSError as error:
            raise PsycheError(f"cannot read {path} of data.source.paths: {error.strerror}") from error


def _files(paths: Iterable[str]) -> list[Path]:
    """Return every file behind ``paths`` once: in the order of ``paths``, sorted by relative path below each."""
    found: dict[Path, None] = {}
    for pattern in paths:
        path = Path(pattern).expanduser()
        if path.is_dir():
            visible = (file for file in path.rglob("*") if not _hidden(file.relative_to(path)))
            files = _sorted_below(path, visible)
        elif path.is_file():
            files = [path]
        else:
            files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = [file for file in files if file.is_file()]
        if not files:
            raise PsycheError(f"data.source.paths: no file matches {pattern!r} (looked from {Path.cwd()}): correct it")
        found.update((file.resolve(), None) for file in files)
    return list(found)


def _sorted_below(root: Path, paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


# ------------------------------------------------------------------------------------------ datasets


def _dataset(source: HubSource) -> Iterator[str]:
    rows = _rows(source)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # the readers of many formats raise their own types
            raise _unreadable(source, error) from error
        if row is None:
            return
        if not _matches(row, source.filters):
            continue
        text = row.get(source.text_column)
        if source.text_column not in row or not isinstance(text, str | None):
            kind = f"holds {type(text).__name__}, not text" if source.text_column in row else "is not there"
            raise PsycheError(
                f"data.source.text_column: column {source.text_column!r} of {source.path} {kind}; its columns are "
                f"{', '.join(sorted(row))}"
            )
        yield text or ""


def _rows(source: HubSource) -> Iterator[dict[str, Any]]:
    import datasets  # a second to import, and only this source needs it

    slice_ = re.fullmatch(SPLIT, source.split)
    assert slice_ is not None, "the configuration has checked it"
    start, stop = (int(slice_[end]) if slice_[end] else None for end in ("start", "stop"))
    try:
        rows = datasets.load_dataset(
            source.path,
            source.name,
            data_dir=source.data_dir,
            data_files=list(_listed(source.data_files)) or None,
            revision=source.revision,
            split=slice_["name"],
            streaming=True,
        )
        return islice(iter(rows.skip(start) if start else rows), None if stop is None else max(0, stop - (start or 0)))
    except Exception as error:  # unknown name, split, configuration, no network: each its own type
        raise _unreadable(source, error) from error


def _unreadable(source: HubSource, error: Exception) -> PsycheError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return PsycheError(
        f"data.source: dataset {source.path!r} (name {source.name}, split {source.split}, data_files "
        f"{', '.join(_listed(source.data_files)) or None}) cannot be read: {reason[:300]}; check these fields and the "
        "network"
    )


def _matches(row: Mapping[str, Any], filters: Sequence[Filter]) -> bool:
    """Return whether ``row`` meets all conditions. Raises :class:`PsycheError` for a missing or incomparable column."""
    return all(_meets(row, condition) for condition in filters)


def _meets(row: Mapping[str, Any], condition: Filter) -> bool:
    if condition.column not in row:
        raise PsycheError(
            f"data.source.filters: no column {condition.column!r}; the columns are {', '.join(sorted(row))}"
        )
    found = row[condition.column]
    try:
        return found is not None and bool(_OPERATORS[condition.op](found, condition.value))
    except TypeError:
        raise PsycheError(
            f"data.source.filters: column {condition.column!r} holds {type(found).__name__}, to "
            f"which {condition.op!r} {condition.value!r} does not apply: correct the filter"
        ) from None


# ------------------------------------------------------------------------------------------ mixtures


@dataclass
class Part(Generic[T]):
    """One part of a mixture, and how far it has been read."""

    weight: float
    open: Callable[[], Iterator[T]]
    """Returns its items from the start."""
    rest: Iterator[T]
    """The remaining items of this pass."""
    size: int = 0
    """Size of all items taken so far, in the unit in which shares are measured."""
    passes: int = 0
    """How often the part was read to its end."""


def interleave(
    parts: Sequence[Part[T]], size: Callable[[T], int], stop: Literal["first_exhausted", "all_exhausted"]
) -> Iterator[tuple[int, T]]:
    """Yield part number and item, always from the part that is furthest behind its share (the first of equals).

    So ``size / weight`` of two parts never differs by more than one item's size over its part's weight. ``parts``
    are updated before an item is yielded, and hold all that is needed to resume. ``stop`` is that of
    :class:`~psyche.config.MixtureSource`. Raises :class:`PsycheError` for a part without items.
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
                raise PsycheError(f"data.source.parts.{number} has no documents: correct it or remove it")
        part.size += size(item)
        yield number, item
