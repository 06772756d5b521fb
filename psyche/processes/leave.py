"""Ask a running node to leave, from another process, and report its progress from its log."""

from __future__ import annotations

import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

from psyche.errors import PsycheError
from psyche.processes.process_lock import NodeProcess, process_of
from psyche.telemetry.event_log import LOG_NAME, EventFollower
from psyche.telemetry.events import Downloading, Event, Leaving, Left, PhaseChanged, RunFinished, StepDone
from psyche.telemetry.lines import contributor_line
from psyche.telemetry.view_state import ViewState

POLL_SECONDS = 0.1
ACKNOWLEDGE_SECONDS = 30.0
"""Time in which a node starts to leave unless it is stopped or hangs."""
END_SECONDS = 60.0
"""Time for the last checkpoint and the shutdown, beyond the time that the node announced."""


def ask_to_leave(directory: Path, say: Callable[[str], None], *, now: bool) -> None:
    """Ask the node in ``directory`` to leave, ``say`` its progress, and return when its process has ended.

    With ``now`` it leaves within seconds, as after Ctrl-C; otherwise it finishes the current round. Raises
    :class:`PsycheError` if no node runs there, if it does not leave in time, or if it ended without leaving.
    """
    with process_of(directory) as running:
        log = _LogReader(directory / LOG_NAME)
        log.read(lambda line: None)
        running.send(signal.SIGINT if now else signal.SIGUSR1)
        deadline = time.monotonic() + ACKNOWLEDGE_SECONDS
        while not _ended(running):
            for event in log.read(say):
                if isinstance(event, Leaving):
                    deadline = time.monotonic() + event.seconds + END_SECONDS
            if time.monotonic() > deadline:
                raise PsycheError(
                    f"the node in {directory} (process {running.pid}) did not leave in time: if it was stopped, "
                    f"kill -CONT {running.pid}; kill -9 {running.pid} ends it; the run goes on without it"
                )
        log.read(say)
    if not log.orderly:
        raise PsycheError(
            f"the node in {directory} ended without leaving the run: see {directory / LOG_NAME}; run the same "
            "psyche join command to rejoin"
        )


def _ended(running: NodeProcess) -> bool:
    """Wait up to POLL_SECONDS for the process to end; return whether it has."""
    return bool(select.select([running.descriptor], [], [], POLL_SECONDS)[0])


class _LogReader:
    """Reads the event log of a node as lines for its owner."""

    def __init__(self, path: Path) -> None:
        self._follower = EventFollower(path)
        self.state = ViewState()
        self.orderly = False
        """Whether the process may end now without an error: the node has left or not joined yet, or the run is over."""

    def read(self, say: Callable[[str], None]) -> list[Event]:
        """Return the new events, and ``say`` those that matter to the owner."""
        found = list(self._follower.new())
        for event in found:
            self.state = ViewState(me=event.node) if not self.state.me else self.state
            self.state = self.state.apply(event)
            if isinstance(event, Left | RunFinished):
                self.orderly = True
            elif isinstance(event, PhaseChanged):
                self.orderly = event.phase == "joining"
            if not isinstance(event, StepDone | Downloading) and (line := contributor_line(self.state, event)):
                say(line)
        return found
