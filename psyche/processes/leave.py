"""Asking a running node to leave, from outside of it, and watching how that goes."""

from __future__ import annotations

import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

from psyche.errors import PsycheError
from psyche.processes.process_lock import Running, process_of
from psyche.telemetry.event_log import LOG_NAME, EventFollower
from psyche.telemetry.events import Downloading, Event, Leaving, Left, PhaseChanged, RunFinished, StepDone
from psyche.telemetry.lines import contributor_line
from psyche.telemetry.view_state import ViewState

POLL_SECONDS = 0.1
HEED_SECONDS = 30.0
"""A node that has not begun to leave by then does not hear."""
END_SECONDS = 60.0
"""What a node has, beyond the bound that it said, for its last checkpoint and its goodbye."""


def ask_to_leave(directory: Path, say: Callable[[str], None], *, now: bool) -> None:
    """Ask the node in ``directory`` to leave, ``say`` what it waits for, and return when its process has ended.

    With ``now`` it goes within seconds, as after Ctrl-C; otherwise it finishes the round it is in. Raises
    :class:`PsycheError` where no node runs there, where it does not go, or where it ended otherwise.
    """
    with process_of(directory) as running:
        story = _Story(directory / LOG_NAME)
        story.read(lambda line: None)
        running.send(signal.SIGINT if now else signal.SIGUSR1)
        deadline = time.monotonic() + HEED_SECONDS
        while not _ended(running):
            for event in story.read(say):
                if isinstance(event, Leaving):
                    deadline = time.monotonic() + event.seconds + END_SECONDS
            if time.monotonic() > deadline:
                raise PsycheError(
                    f"the node in {directory} was asked to leave and is still there: kill -CONT {running.pid} if it "
                    f"was stopped, kill -9 {running.pid} to end it; the others go on without it"
                )
        story.read(say)
    if not story.orderly:
        raise PsycheError(
            f"the node in {directory} ended, and did not say how: look at {directory / LOG_NAME}; the same psyche join "
            "line brings it back"
        )


def _ended(running: Running) -> bool:
    """Whether the process ends within POLL_SECONDS."""
    return bool(select.select([running.descriptor], [], [], POLL_SECONDS)[0])


class _Story:
    """What a node's log says, in lines for its owner."""

    def __init__(self, path: Path) -> None:
        self._follower = EventFollower(path)
        self.state = ViewState()
        self.orderly = False
        """There is nothing to explain if it ends now: it has left, the run is finished, or it has not joined yet."""

    def read(self, say: Callable[[str], None]) -> list[Event]:
        """What is new."""
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
