"""Progress on stderr: a line for each step that ended, and a bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_lines(verb: str, total: float) -> Iterator[Callable[[str, float], None]]:
    """Yield a function that prints a line and advances the bar by an amount of ``total`` (0: not at all)."""
    console = Console(stderr=True)
    columns = (TextColumn(verb), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def done(line: str, advance: float = 0.0) -> None:
            bar.advance(task, advance)
            if not console.is_terminal:
                print(line, file=sys.stderr, flush=True)
            else:
                bar.console.print(line, highlight=False, markup=False)

        yield done
