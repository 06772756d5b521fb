"""Read an event log while it is being written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from psyche.telemetry.events import AnyEvent, Event


class EventFollower:
    """Gives each event of a log once, as soon as its line is whole. The file need not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)

    def new(self) -> Iterator[Event]:
        """Events written since the last call. Lines that are not events are passed over."""
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
