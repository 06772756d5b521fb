"""What benches do alike: a corpus, the trials of chosen rows, wide tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TypeVar

from rich.console import Console

from psyche.bench.pool import run_all
from psyche.bench.progress import progress
from psyche.bench.trials import Outcome, Setting, Trial
from psyche.data.prepare import Report, prepare
from psyche.errors import PsycheError

T = TypeVar("T")
Preparing = Callable[[], AbstractContextManager[Report | None]]
"""Shows how the corpus is prepared, which happens once."""


def prepare_corpus(setting: Setting, preparing: Preparing) -> None:
    """Have the setting's corpus in the cache. Raises ``PsycheError``."""
    with preparing() as report:
        prepare(setting.data, setting.cache.expanduser(), vocab_limit=setting.model.vocab_size, progress=report)


def chosen(rows: Iterable[T], name: Callable[[T], str], only: str | None) -> list[T]:
    """Those whose name contains ``only``. Raises :class:`PsycheError` where none does."""
    rows = list(rows)
    wanted = [row for row in rows if only is None or only in name(row)]
    if not wanted:
        raise PsycheError(f"no row has {only!r} in its name; names are like {name(rows[0])} and {name(rows[-1])}")
    return wanted


def outcomes_of(setting: Setting, trials: Iterable[Trial]) -> dict[Trial, Outcome]:
    """Run every different trial once, on all cores, with progress on stderr."""
    different = set(trials)
    with progress(different) as done:
        return run_all(setting, different, done)


def wide_console(columns: int = 132) -> Console:
    """stdout with at least so many columns: wrapped lines read better than cells of three letters."""
    console = Console()
    console.width = max(console.width, columns)
    return console
