"""Progress of preparing a token store: a live bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from psyche.data.prepare import Progress
from psyche.telemetry.formatting import amount

STAGES = {
    "waiting": "waiting for another process that is preparing this store",
    "tokenizer": "reading text for the tokenizer",
    "merges": "training the tokenizer",
    "tokens": "encoding",
    "shuffle": "shuffling",
}
LINE_EVERY = 5.0
"""Seconds between progress lines where there is no terminal."""


@contextmanager
def progress_display() -> Iterator[Callable[[Progress], None]]:
    """Yield a function that shows each report; on stderr, so that stdout holds only the result."""
    if not sys.stderr.isatty():
        yield _lines()
        return

    class Polled(Bars):
        """Reads the latest report only when it draws: there is one report for each document."""

        latest: Progress | None = None

        def get_renderables(self) -> Iterable[RenderableType]:
            if self.latest is not None:
                at = self.latest
                for stage, task in tasks.items():
                    self.update(task, visible=stage == at.stage)
                self.start_task(tasks[at.stage])
                amounts = _amounts(at, self.tasks[tasks[at.stage]].elapsed or 0.0)
                self.update(tasks[at.stage], completed=at.done, total=at.total, count=_count(at), amounts=amounts)
            return super().get_renderables()

    texts = [TextColumn(f"{{task.{name}}}") for name in ("description", "fields[count]", "fields[amounts]")]
    columns = (texts[0], BarColumn(bar_width=12), *texts[1:], TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Polled(*columns, console=Console(stderr=True), transient=True) as bars:
        for stage, about in STAGES.items():  # one bar for each, so that its times are its own
            tasks[stage] = bars.add_task(about, start=False, total=None, visible=False, count="", amounts="")
        yield lambda at: setattr(bars, "latest", at)


def _lines() -> Callable[[Progress], None]:
    stage, began, printed = "", 0.0, 0.0

    def report(at: Progress) -> None:
        nonlocal stage, began, printed
        now = time.monotonic()
        if at.stage != stage:
            stage, began = at.stage, now
        elif now - printed < LINE_EVERY:
            return
        printed = now
        print(" ".join(filter(None, (f"{STAGES[stage]}:", _count(at), _amounts(at, now - began)))), file=sys.stderr)

    return report


def _count(at: Progress) -> str:
    return f"{at.done:,}{f' of {at.total:,}' if at.total else ''}" if at.done else ""


def _amounts(at: Progress, seconds: float) -> str:
    """Tokens, tokens a second and megabytes of text after ``seconds`` of a stage; empty before the first token."""
    if not at.tokens:
        return ""
    speed = f" {amount(at.tokens / seconds)}/s" if seconds > 1 else ""
    return f"{amount(at.tokens)} tokens{speed}{f' {at.bytes / 1e6:,.0f} MB' if at.bytes else ''}"
