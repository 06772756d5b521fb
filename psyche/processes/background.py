"""What runs beside a process's own work: it is stopped with it, and its failures are said and stop nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog


def warning(log: EventLog) -> Callable[[str], None]:
    """Says a warning in ``log``."""
    return lambda text: log.emit(events.Notice(level="warning", text=text))


@contextlib.asynccontextmanager
async def beside(warn: Callable[[str], None], *work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run ``work`` beside the block, and stop it at the block's end. What fails meanwhile is said and stops nothing."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            warn(f"{task.get_name()} has stopped ({type(error).__name__}: {error}); the rest goes on")

    tasks = [asyncio.create_task(one, name=getattr(one, "__name__", "a task")) for one in work]
    for task in tasks:
        task.add_done_callback(ended)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
