"""When a node takes part: during scheduled hours (``node.schedule``), while its machine is idle (``node.idle_only``).

Outside these times it stops training at once, submits the steps it has done, leaves the run once the round is
certified, frees its memory and waits in the same process. It rejoins with the same identity.
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
from psyche.config.units import Hours
from psyche.durable import disk_errors
from psyche.processes.connect import background_tasks
from psyche.processes.idleness import CALM_SECONDS, IdleDetector, LoadSampler, cores
from psyche.processes.process_lock import registered
from psyche.training.devices import pick_device
from psyche.worker.leaving import LeaveRequest

CHECK_SECONDS = 5.0


async def run_when_available(
    session: Callable[[], Awaitable[None]],
    node: Node,
    directory: Path,
    leave_request: LeaveRequest,
    say: Callable[[str], None],
) -> None:
    """Run ``session`` whenever the node is available, until a session ends for another reason than unavailability.

    A session is one stay in the run and ends on ``leave_request``. ``say`` tells the owner what the node waits for.
    Raises what ``session`` raises.
    """
    availability = Availability(node)
    if not availability.limited:
        await session()
        return
    async with background_tasks(say, availability.watch(leave_request)):
        while True:
            if availability.reason:
                await _wait(availability, directory, say)
                leave_request.renew()  # a request to rest was made meanwhile
            await session()
            if not leave_request.resting:
                return
            leave_request.renew()
            gc.collect()
            torch.cuda.empty_cache()


async def _wait(availability: Availability, directory: Path, say: Callable[[str], None]) -> None:
    """Wait until the node is available. ``psyche leave`` finds the waiting process as it finds a training one."""
    with disk_errors(directory, "--directory"):
        await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True)
    async with registered(directory):
        say(f"waiting: {availability.reason}")
        await availability.wait()


class Availability:
    """Whether the node may take part now, checked every few seconds."""

    def __init__(self, node: Node) -> None:
        self._hours = None if node.schedule is None else Hours.parse(node.schedule)
        self._detector = IdleDetector(cores()) if node.idle_only else None
        self._sampler = LoadSampler(pick_device(node.device)) if node.idle_only else None
        self._available = asyncio.Event()
        self.reason = ""
        """Why the node is unavailable, for people; empty while it is available."""
        self._check(datetime.now())

    @property
    def limited(self) -> bool:
        """Whether the configuration limits availability at all."""
        return self._hours is not None or self._detector is not None

    async def wait(self) -> None:
        """Return once the node is available."""
        await self._available.wait()

    async def watch(self, leave_request: LeaveRequest) -> None:
        """Check every few seconds and request rest while the node is unavailable. Runs until cancelled."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            await asyncio.to_thread(self._check, datetime.now())
            if self.reason:
                self._available.clear()
                leave_request.rest(self.reason)
            else:
                self._available.set()

    def _check(self, moment: datetime) -> None:
        idle = True
        if self._detector is not None and self._sampler is not None:
            idle = self._detector.observe(self._sampler.sample(), time.monotonic())
        if self._hours is not None and moment not in self._hours:
            self.reason = f"outside its scheduled hours; they begin again at {self._hours.next_opening(moment)}"
        elif not idle:
            self.reason = (
                f"other programs use this machine; training resumes after {CALM_SECONDS / 60:.0f} idle minutes"
            )
        else:
            self.reason = ""
