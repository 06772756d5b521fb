"""Records a run from outside: who certified which round when, on this process's clock, and all payloads.

Clocks of the observed processes jump, so the times in event logs are unusable. Nodes keep payloads for a few rounds
only, so they are copied.
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
from tests.slow.chaos.testbed import Testbed

POLL_SECONDS = 0.2
COUNT_SECONDS = 2.0


@dataclass
class Observations:
    """Times are of ``time.monotonic``, accurate to ``POLL_SECONDS`` plus the duration of a poll."""

    first: dict[int, float] = field(default_factory=dict)
    """When the first process was seen to have a round certified."""
    own: dict[str, dict[int, float]] = field(default_factory=dict)
    """When each process was seen to complete a round with the others."""
    accepted: dict[int, frozenset[str]] = field(default_factory=dict)
    """PeerIDs whose work each round accepted."""

    @property
    def newest(self) -> int:
        return max(self.first, default=0)

    def next_after(self, moment: float, name: str | None = None) -> float | None:
        """Return when the next round was certified (with ``name`` taking part, if given), or None."""
        times = self.first if name is None else self.own.get(name, {})
        return min((at for at in times.values() if at > moment), default=None)


class RunObserver:
    """Polls on a thread of its own inside the ``with`` block."""

    def __init__(self, world: Testbed, payloads: Path) -> None:
        self.seen, self._descendants = Observations(), set[tuple[int, str]]()
        self._world, self._payloads = world, payloads
        self._logs: dict[str, BinaryIO] = {}
        self._decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll)
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
        """Return the observed processes of the run that are still alive."""
        return [pid for pid, born in self._descendants if alive(pid) and _start_time(pid) == born]

    def _poll(self) -> None:
        try:
            counted = 0.0
            while True:
                last = self._done.is_set()
                for name in self._world.hosts:
                    self._read(name)
                    self._collect(self._world.directory / name / JOURNAL)
                if time.monotonic() - counted > COUNT_SECONDS:
                    counted = time.monotonic()
                    for process in list(self._world.processes.values()):
                        self._descendants |= {(pid, _start_time(pid)) for pid in descendants(process.pid)}
                if last:
                    return
                self._done.wait(POLL_SECONDS)
        except BaseException as error:
            self._failure = error

    def _read(self, name: str) -> None:
        """Read the new lines of a log. An incomplete line is read next time."""
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
        """Copy new files of a journal: a file gets its name only when complete, and may be deleted at any time."""
        with contextlib.suppress(OSError):
            for path in journal.glob("*.blob"):
                kept = self._payloads / path.name
                if not kept.exists():
                    draft = kept.with_suffix(".part")
                    shutil.copyfile(path, draft)
                    draft.rename(kept)


def _start_time(pid: int) -> str:
    """Return the start time of a process, to recognise a reused pid; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
