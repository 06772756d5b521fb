"""The local log of events in JSON lines: writer, reader and follower.

A line that a crash cut short, or that a newer version wrote, does not affect other lines.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from psyche.errors import PsycheError
from psyche.telemetry.events import AnyEvent, Event, Notice

LOG_NAME = "events.jsonl"
"""The log's file name inside a node's run directory."""

Listener = Callable[[Event], None]
"""Called with every event, in order, one at a time. It must return quickly: the emitter waits for it."""


class EventLog:
    """Appends events to a file and passes them to listeners. Thread-safe; :meth:`emit` never raises.

    A listener may emit: its event follows the one that it was called with, for every listener.
    Raises :class:`PsycheError` if the file cannot be opened.
    """

    def __init__(
        self, path: Path, node: str, listeners: tuple[Listener, ...] = (), clock: Callable[[], float] = time.time
    ) -> None:
        self.dropped = 0
        """Events that were passed to listeners but not written (disk full)."""
        self._node = node
        self._listeners = list(listeners)
        self._clock = clock
        self._lock = threading.RLock()
        self._pending: deque[Event] = deque()
        self._draining = False
        self._failed: set[int] = set()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: one write is one whole line, and a crash loses nothing that was emitted.
            self._file = path.open("ab", buffering=0)
            self._torn = _ends_torn(path)
        except OSError as error:
            raise PsycheError(f"cannot write the event log {path}: {error.strerror}") from None

    def subscribe(self, listener: Listener) -> None:
        """Pass later events to ``listener`` too."""
        with self._lock:
            self._listeners.append(listener)

    def emit(self, event: Event) -> None:
        """Add time and node to ``event``, write it, and pass it to the listeners."""
        with self._lock:
            self._pending.append(msgspec.structs.replace(event, time=self._clock(), node=self._node))
            if self._draining:  # emitted by a listener: the loop below, further up this stack, delivers it
                return
            self._draining = True
            try:
                while self._pending:
                    self._deliver(self._pending.popleft())
            finally:
                self._draining = False

    def close(self) -> None:
        """Close the file. Later events reach the listeners only."""
        with self._lock:
            self._file.close()

    def _deliver(self, event: Event) -> None:
        self._write(event)
        for listener in tuple(self._listeners):
            try:
                listener(event)
            except Exception as error:  # a broken terminal must not stop training
                if id(listener) not in self._failed:
                    self._failed.add(id(listener))
                    name = type(error).__name__
                    self.emit(
                        Notice("error", f"telemetry: a listener raised {name} on {type(event).__name__}: {error}")
                    )

    def _write(self, event: Event) -> None:
        if self._file.closed:
            return
        reason = ""
        try:
            # A line that was cut short stays a line of its own, so that the next one can be read.
            line = (b"\n" if self._torn else b"") + msgspec.json.encode(event) + b"\n"
            self._torn = self._file.write(line) < len(line)
            reason = "no space left" if self._torn else ""
        except OSError as error:
            reason = error.strerror or str(error)
        except ValueError as error:  # text that is not Unicode, such as an odd file name
            reason = f"{type(event).__name__}: {error}"
        if reason:
            self.dropped += 1
            if self.dropped == 1:
                text = f"an event could not be written to the log ({reason}); the run continues with gaps in its log"
                self.emit(Notice("warning", text))


def _ends_torn(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            return False
        file.seek(-1, 2)
        return file.read(1) != b"\n"


class EventReader(Iterator[Event]):
    """Reads a log's events, oldest first. Lines that are not events are skipped and counted in ``skipped``."""

    def __init__(self, path: Path) -> None:
        self.skipped = 0
        """Lines so far that a crash cut short or a newer version wrote."""
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise PsycheError(f"cannot read the event log {path}: {error.strerror}") from None
        self._decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)

    def __next__(self) -> Event:
        for line in self._file:
            try:
                return self._decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                self.skipped += line != b"\n"
        self._file.close()
        raise StopIteration


def read_events(path: Path) -> EventReader:
    """Read a log, also one that is still being written. Raises :class:`PsycheError` if it cannot be read."""
    return EventReader(path)


class EventFollower:
    """Returns each event of a log once, as soon as its line is complete. The file need not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)

    def new(self) -> Iterator[Event]:
        """Yield the events written since the last call. Lines that are not events are skipped."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written; read again next time
                self._position += len(line)
                try:
                    yield self._decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    continue
