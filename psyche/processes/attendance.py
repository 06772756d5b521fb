"""When a node takes part: within its hours, and while its machine is idle, as its owner said.

Outside of these it stops training at once and hands in what it has done. Once the round is certified it says goodbye,
frees its memory and waits in its process, out of the run: no plan counts on it. Then it comes back with the same
identity, as the same line would bring it back.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path

import torch

from psyche.config import Node
from psyche.durable import disk_errors
from psyche.hours import Hours
from psyche.processes.background import beside
from psyche.processes.idleness import Idleness, Sampler, cores
from psyche.processes.process_lock import registered
from psyche.training.devices import pick_device
from psyche.worker.leaving import LeaveRequest

LOOK_SECONDS = 5.0


async def attend(
    session: Callable[[], Awaitable[None]],
    node: Node,
    directory: Path,
    leave_request: LeaveRequest,
    say: Callable[[str], None],
) -> None:
    """Run ``session``, which ``leave_request`` can end, whenever ``node`` is to take part, until one ends by itself.

    Each is one stay in the run. ``say`` tells this machine's owner what is waited for. Raises what ``session`` raises.
    """
    calendar = Calendar(node)
    if not calendar.limited:
        await session()
        return
    async with beside(say, calendar.watch(leave_request)):
        while True:
            if calendar.closed:
                await _wait(calendar, directory, say)
                leave_request.renew()  # it was told to rest all the while
            await session()
            if not leave_request.resting:
                return
            leave_request.renew()
            gc.collect()
            torch.cuda.empty_cache()


async def _wait(calendar: Calendar, directory: Path, say: Callable[[str], None]) -> None:
    """Until the node is to take part; ``psyche leave`` finds it meanwhile, as it finds one that trains."""
    with disk_errors(directory, "--directory"):
        await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True)
    async with registered(directory):
        say(f"waiting: {calendar.closed}")
        await calendar.open()


class Calendar:
    """Why a node does not take part now, looked at every few seconds."""

    def __init__(self, node: Node) -> None:
        self._hours = None if node.schedule is None else Hours.parse(node.schedule)
        self._idleness = Idleness(cores()) if node.idle_only else None
        self._sampler = Sampler(pick_device(node.device)) if node.idle_only else None
        self._opened = asyncio.Event()
        self.closed = ""
        """Why, in words; empty where it does."""
        self._look(datetime.now())

    @property
    def limited(self) -> bool:
        """Whether there is anything to look at."""
        return self._hours is not None or self._idleness is not None

    async def open(self) -> None:
        """Return once the node is to take part."""
        await self._opened.wait()

    async def watch(self, leave_request: LeaveRequest) -> None:
        """Look every few seconds, and have the node rest while it is not to take part. Runs until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await asyncio.to_thread(self._look, datetime.now())
            if self.closed:
                self._opened.clear()
                leave_request.rest(self.closed)
            else:
                self._opened.set()

    def _look(self, moment: datetime) -> None:
        idle = True
        if self._idleness is not None and self._sampler is not None:
            idle = self._idleness.observe(self._sampler.sample(), time.monotonic())
        if self._hours is not None and moment not in self._hours:
            self.closed = f"outside of its hours, which begin again at {self._hours.next_opening(moment)}"
        elif not idle:
            self.closed = "this machine is in use; it comes back when others have left it alone for some minutes"
        else:
            self.closed = ""
