"""What is seen of a run from outside while it goes on: who certified what when, by this process's clock, and payloads.

Event logs have times of their own, from clocks that jump here. Payloads are kept by nodes for some rounds only; all
that any of them ever took is copied.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import msgspec

from psyche.exchange.payload_journal import DIRECTORY as JOURNAL
from psyche.telemetry.event_log import LOG_NAME
from psyche.telemetry.events import AnyEvent, RoundCertified
from tests.processes.swarm import alive, descendants
from tests.slow.chaos.world import World

LOOK_SECONDS = 0.2
COUNT_SECONDS = 2.0


@dataclass
class Seen:
    """Times are of ``time.monotonic``, right within ``LOOK_SECONDS`` and what a look takes."""

    first: dict[int, float] = field(default_factory=dict)
    """When anybody was first seen to have a round certified."""
    own: dict[str, dict[int, float]] = field(default_factory=dict)
    """When each process was seen to have gone through a round with the others."""
    accepted: dict[int, frozenset[str]] = field(default_factory=dict)
    """Whose work a round took, by PeerID."""

    @property
    def newest(self) -> int:
        return max(self.first, default=0)

    def next_after(self, moment: float, name: str | None = None) -> float | None:
        """When the next round was certified, by anybody or with ``name`` taking part; None where none was."""
        times = self.first if name is None else self.own.get(name, {})
        return min((at for at in times.values() if at > moment), default=None)


class Watch:
    """Looks on a thread of its own while the block is not left."""

    def __init__(self, world: World, payloads: Path) -> None:
        self.seen, self._below = Seen(), set[tuple[int, str]]()
        self._world, self._payloads = world, payloads
        self._logs: dict[str, BinaryIO] = {}
        self._decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look_on)
        self._failure: BaseException | None = None
        payloads.mkdir()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        for log in self._logs.values():
            log.close()
        if self._failure is not None:
            raise self._failure

    def orphans(self) -> list[int]:
        """Which of all that the run's processes ever started, as far as was seen, is still there."""
        return [pid for pid, born in self._below if alive(pid) and _born(pid) == born]

    def _look_on(self) -> None:
        try:
            counted = 0.0
            while True:
                last = self._done.is_set()
                for name in self._world.spots:
                    self._read(name)
                    self._collect(self._world.directory / name / JOURNAL)
                if time.monotonic() - counted > COUNT_SECONDS:
                    counted = time.monotonic()
                    for process in list(self._world.processes.values()):
                        self._below |= {(pid, _born(pid)) for pid in descendants(process.pid)}
                if last:
                    return
                self._done.wait(LOOK_SECONDS)
        except BaseException as error:
            self._failure = error

    def _read(self, name: str) -> None:
        """What is new in a log. A line that is being written is taken the next time."""
        path = self._world.directory / name / LOG_NAME
        if name not in self._logs:
            if not path.exists():
                return
            self._logs[name] = path.open("rb")
        log = self._logs[name]
        while line := log.readline():
            if not line.endswith(b"\n"):
                log.seek(-len(line), 1)
                return
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):  # torn by a kill or a full disk
                event = self._decoder.decode(line)
                if isinstance(event, RoundCertified):
                    self._note(name, event)

    def _note(self, name: str, event: RoundCertified) -> None:
        now = time.monotonic()
        self.seen.first.setdefault(event.round, now)
        self.seen.own.setdefault(name, {}).setdefault(event.round, now)
        self.seen.accepted.setdefault(event.round, frozenset(event.accepted))

    def _collect(self, journal: Path) -> None:
        """Copy what is new in a journal. A file has its name there only once it is whole, and may be dropped."""
        with contextlib.suppress(OSError):
            for path in journal.glob("*.blob"):
                kept = self._payloads / path.name
                if not kept.exists():
                    draft = kept.with_suffix(".part")
                    shutil.copyfile(path, draft)
                    draft.rename(kept)


def _born(pid: int) -> str:
    """Tells a process from a later one with the same pid; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
