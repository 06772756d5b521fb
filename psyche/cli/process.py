"""Running a coordinator or a node as this process: signals, the terminal, the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psyche.errors import PsycheError

if TYPE_CHECKING:
    from psyche.config import Config, Node
    from psyche.network.invite import Invite
    from psyche.worker.leaving import LeaveRequest

PARENT = "PSYCHE_PARENT"
"""Environment: the pid of a launcher that this process must not outlive."""
RUNS = Path("~/.local/share/psyche")
"""Where nodes keep their directories, each named by its run."""
STOP_SECONDS = 20.0
"""After SIGTERM, which also comes when the launcher is gone: nobody may be there to send another."""
INVITE_SECONDS = 900.0
"""How long ``join @FILE`` waits for the file: a coordinator may have a corpus to prepare."""


def read_invite(text: str) -> Invite:
    """An invite, or the one in ``@FILE``, which is waited for. Raises ``PsycheError``."""
    from psyche.network.invite import Invite

    if not text.startswith("@"):
        return Invite.parse(text)
    path, started = Path(text[1:]), time.monotonic()
    _warm_up()
    while not path.exists():
        if time.monotonic() - started > INVITE_SECONDS:
            raise PsycheError(f"no invite appeared at {path} for {INVITE_SECONDS / 60:.0f} minutes; is its run up?")
        _stay_with_parent()
        time.sleep(0.1)
    return Invite.parse(path.read_text())


def run_node(invite: Invite, node: Node, directory: Path | None) -> None:
    """Be a node until the run ends, Ctrl-C, or ``psyche leave``."""
    _stay_with_parent()
    from psyche.processes.attendance import attend
    from psyche.processes.node import join
    from psyche.telemetry.event_log import Listener
    from psyche.telemetry.view import ContributorView, live
    from psyche.worker.leaving import LeaveRequest

    where, leave_request = directory or home_of(invite), LeaveRequest()

    async def stay() -> None:
        with contextlib.ExitStack() as stack:

            def listener(me: str) -> Listener:
                return stack.enter_context(live(ContributorView(me)))

            await join(invite, node, where, listener, leave_request)

    def say(text: str) -> None:
        print(f"psyche: {text}", flush=True)

    _run(attend(stay, node, where, leave_request, say), leave_request)


def home_of(invite: Invite) -> Path:
    """The directory of a node that was given none."""
    return RUNS.expanduser() / invite.run_id.hex()[:16]


def run_coordinator(config: Config, directory: Path) -> None:
    """Be the coordinator until the run ends or Ctrl-C."""
    _stay_with_parent()
    from psyche.cli.data import progress_display
    from psyche.processes.node import coordinate
    from psyche.telemetry.view import SwarmView, live

    with live(SwarmView()) as listener, progress_display() as progress:
        _run(coordinate(config, directory, listener, progress))


def run_standby(invite: Invite, node: Node, directory: Path) -> None:
    """Be a standby coordinator until the run ends or Ctrl-C."""
    _stay_with_parent()
    from psyche.processes.standby import stand_by
    from psyche.telemetry.view import SwarmView, live

    with live(SwarmView()) as listener:
        _run(stand_by(invite, node, directory, listener))


def _run(work: Coroutine[Any, Any, None], leave_request: LeaveRequest | None = None) -> None:
    """Run to the end, or until a signal ends it.

    Ctrl-C asks a node to hand in what it can within seconds and to leave, SIGUSR1 (``psyche leave``) to finish the
    round first. SIGTERM, and Ctrl-C where nobody is there to ask, cancel, so that goodbyes are said. A second Ctrl-C
    or SIGTERM ends the process at once, and the first SIGTERM after STOP_SECONDS: a thread that prepares text, say,
    cannot be cancelled.
    """
    pressed: set[int] = set()

    async def main() -> None:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()

        def ask(*, quickly: bool) -> None:
            if leave_request is None or not leave_request.ask(quickly=quickly):
                task.cancel()

        def stop(number: int) -> None:
            if number in pressed:
                _end_at_once(number)
            pressed.add(number)
            if number == signal.SIGINT:
                ask(quickly=True)
            else:
                task.cancel()
                hurry = threading.Timer(STOP_SECONDS, _end_at_once, [number])
                hurry.daemon = True
                hurry.start()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
        if leave_request is not None:
            loop.add_signal_handler(signal.SIGUSR1, lambda: ask(quickly=False))
        try:
            await task
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None

    asyncio.run(main())
    if signal.SIGINT in pressed:
        raise KeyboardInterrupt


def _end_at_once(number: int) -> None:
    """End here and now: what is on disk is whole at any moment, and the kernel ends our children."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h\n")  # the view hides the cursor
        sys.stdout.flush()
    os._exit(128 + number)


def _stay_with_parent() -> None:
    """Where a launcher started us, end when it ends, whatever ended it."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
        sys.exit("psyche: the launcher is gone")


def _warm_up() -> None:
    """Import what takes seconds while there is nothing else to do."""
    import psyche.processes.node  # noqa: F401
