"""Who waits for a bench sees what has ended."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from psyche.bench.trials import Outcome, Trial


@contextmanager
def progress(trials: set[Trial]) -> Iterator[Callable[[Trial, Outcome], None]]:
    """A line for each trial that ended, and on a terminal a bar below them; all on stderr."""
    console = Console(stderr=True)
    columns = (TextColumn("training"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    ended, width = 0, max(len(trial.label) for trial in trials)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(trial.nodes * trial.steps for trial in trials))

        def done(trial: Trial, outcome: Outcome) -> None:
            nonlocal ended
            ended += 1
            bar.advance(task, trial.nodes * trial.steps)
            count = f"{ended:3}/{len(trials)}"
            line = f"{count}  {trial.label:{width}} loss {outcome.heldout_loss:.4f}  {outcome.seconds:4.0f} s"
            if console.is_terminal:
                bar.console.print(line, highlight=False)
            else:
                print(line, file=sys.stderr, flush=True)

        yield done
