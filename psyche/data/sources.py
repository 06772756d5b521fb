"""Where documents come from. A document is one non-empty string; the order is the same every time."""

from __future__ import annotations

import glob
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from psyche.config import HubSource, MixturePart, MixtureSource, Source, StdlibSource, TextSource
from psyche.config.data_config import SPLIT, SingleSource
from psyche.data.filters import passes
from psyche.data.mixture import Part, interleave
from psyche.errors import PsycheError

MAX_FILE_BYTES = 64 << 20
"""A document is in memory whole while it is encoded."""

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_LOCAL = ("_sysconfigdata", "sitecustomize", "usercustomize", "python-config")


def documents(source: Source, max_documents: int | None) -> Iterator[str]:
    """The first ``max_documents`` documents of ``source`` (all of them if None), read as they are asked for.

    Those of a mixture take turns by characters, since there are no tokens yet. Raises :class:`PsycheError` where
    nothing matches, a file or column cannot be read, or a dataset does not load.
    """
    specs, stop = parts_of(source)
    parts = [Part(spec.weight, partial(_texts, spec.source), _texts(spec.source)) for spec in specs]
    return islice((text for _, text in interleave(parts, len, stop)), max_documents)


def parts_of(source: Source) -> tuple[tuple[MixturePart, ...], Literal["first_exhausted", "all_exhausted"]]:
    """The parts of a mixture and when it ends; a source that is none is one of a single part."""
    if isinstance(source, MixtureSource):
        return source.parts, source.stop
    return (MixturePart(weight=1.0, source=source),), "first_exhausted"


def meant_here(source: Source) -> list[str]:
    """What the words of ``source`` refer to on this machine: the interpreter, the files behind a relative path."""
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
            return [meaning for part in parts for meaning in meant_here(part.source)]


def absolute(name: str) -> str:
    """The absolute path of a directory or file, or the name itself where it is one on a hub."""
    return str(Path(name).absolute()) if name and Path(name).exists() else name


def _absolute_pattern(files: str) -> str:
    return files if "://" in files else str(Path(files).absolute())


def _listed(files: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (files,) if isinstance(files, str) else files or ()


def _texts(source: SingleSource) -> Iterator[str]:
    """Every document that is not empty."""
    match source:
        case StdlibSource():
            texts = _stdlib()
        case TextSource():
            texts = _text(source)
        case HubSource():
            texts = _dataset(source)
    return filter(None, texts)


def _stdlib() -> Iterator[str]:
    """Library modules only: distributions leave the tests out, and build configuration names the machine."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in _sorted_below(root, root.rglob("*.py")):
        if _NOT_LIBRARY.isdisjoint(path.relative_to(root).parts) and not path.name.startswith(_LOCAL):
            try:
                yield path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue  # a few modules are in other encodings on purpose


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
    """Every file behind ``paths``, once: in the order of ``paths``, sorted below each, wherever the tree is mounted."""
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
        except Exception as error:  # readers of twenty formats raise what they like
            raise _unreadable(source, error) from error
        if row is None:
            return
        if not passes(row, source.filters):
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
