"""The processes of a run that a bench waits for: what they say, and whether they are there."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from psyche.bench.swarm import last_words
from psyche.errors import PsycheError
from psyche.telemetry.event_log import LOG_NAME, EventFollower
from psyche.telemetry.events import Event, Notice, RoundCertified

POLL_SECONDS = 0.1
PATIENCE = 300.0
"""Seconds without any event after which the run counts as hung."""

E = TypeVar("E", bound=Event)


class Watch:
    """Collects the events of processes whose directories lie in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._followers: dict[str, EventFollower] = {}
        self.events: dict[str, list[Event]] = {}

    def add(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Follow ``process`` from now on; it is not to end before :meth:`drop`."""
        self._processes[name] = process
        self._followers[name] = EventFollower(self._folder / name / LOG_NAME)
        self.events[name] = []

    def drop(self, name: str) -> list[Event]:
        """Follow it no more; all that it has said."""
        del self._processes[name]
        self.events[name] += self._followers.pop(name).new()
        return self.events[name]

    def of(self, name: str, kind: type[E]) -> list[E]:
        """The events of that kind in what ``name`` has said."""
        return [event for event in self.events[name] if isinstance(event, kind)]

    @property
    def rounds(self) -> int:
        """Certified rounds, as the coordinator says."""
        return len(self.of("coordinator", RoundCertified))

    def until(self, done: Callable[[], bool]) -> None:
        """Wait. Raises :class:`PsycheError` where a process ends, or where all are silent for ``PATIENCE``."""
        heard = time.monotonic()
        while not done():
            time.sleep(POLL_SECONDS)
            ended = [name for name, process in self._processes.items() if process.poll() is not None]
            for name, follower in self._followers.items():
                for event in follower.new():
                    heard = time.monotonic()
                    self.events[name].append(event)
                    if isinstance(event, Notice) and event.level != "info":
                        print(f"{name}: {event.text}", file=sys.stderr, flush=True)
            if ended:
                raise PsycheError(f"{ended[0]} ended: {last_words(self._folder / f'{ended[0]}.log')}")
            if time.monotonic() - heard > PATIENCE:
                raise PsycheError(f"nothing happened for {PATIENCE:g} s in the run in {self._folder}")
