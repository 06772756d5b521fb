"""Run a coordinator or a node as the foreground process: signals, terminal, event loop."""

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
"""Environment variable: pid of the launcher that this process must not outlive."""
RUNS = Path("~/.local/share/psyche")
"""Default place of nodes' directories, each named by its run id."""
STOP_SECONDS = 20.0
"""Time to shut down after SIGTERM, which the kernel also sends once when the launcher dies."""
INVITE_SECONDS = 900.0
"""How long ``join @FILE`` waits for the file; the coordinator may have to prepare the data first."""


def read_invite(text: str) -> Invite:
    """Parse an invite. ``@FILE`` names a file that holds it, and is waited for. Raises ``PsycheError``."""
    from psyche.network.invite import Invite

    if not text.startswith("@"):
        return Invite.parse(text)
    path, started = Path(text[1:]), time.monotonic()
    _import_early()
    while not path.exists():
        if time.monotonic() - started > INVITE_SECONDS:
            raise PsycheError(
                f"no invite appeared in {path} within {INVITE_SECONDS / 60:.0f} minutes: is the coordinator running?"
            )
        _stay_with_parent()
        time.sleep(0.1)
    return Invite.parse(path.read_text())


def run_node(invite: Invite, node: Node, directory: Path | None) -> None:
    """Run a node until the run ends, Ctrl-C or ``psyche leave``."""
    _stay_with_parent()
    from psyche.processes.availability import run_when_available
    from psyche.processes.node_process import join
    from psyche.telemetry.event_log import Listener
    from psyche.telemetry.view import ContributorView, live
    from psyche.worker.leaving import LeaveRequest

    where, leave_request = directory or run_directory(invite), LeaveRequest()

    async def session() -> None:
        with contextlib.ExitStack() as stack:

            def listener(peer_id: str) -> Listener:
                return stack.enter_context(live(ContributorView(peer_id)))

            await join(invite, node, where, listener, leave_request)

    def say(text: str) -> None:
        print(f"psyche: {text}", flush=True)

    _run(run_when_available(session, node, where, leave_request, say), leave_request)


def run_directory(invite: Invite) -> Path:
    """Return the default directory of this run's node."""
    return RUNS.expanduser() / invite.run_id.hex()[:16]


def run_coordinator(config: Config, directory: Path) -> None:
    """Run the coordinator until the run ends or Ctrl-C."""
    _stay_with_parent()
    from psyche.data.progress_display import progress_display
    from psyche.processes.coordinator_process import coordinate
    from psyche.telemetry.view import SwarmView, live

    with live(SwarmView()) as listener, progress_display() as progress:
        _run(coordinate(config, directory, listener, progress))


def run_standby(invite: Invite, node: Node, directory: Path) -> None:
    """Run a standby coordinator until the run ends or Ctrl-C."""
    _stay_with_parent()
    from psyche.processes.coordinator_process import stand_by
    from psyche.telemetry.view import SwarmView, live

    with live(SwarmView()) as listener:
        _run(stand_by(invite, node, directory, listener))


def _run(work: Coroutine[Any, Any, None], leave_request: LeaveRequest | None = None) -> None:
    """Run ``work`` to its end or until a signal stops it.

    With a ``leave_request``, Ctrl-C asks the node to submit finished work and leave within seconds, and SIGUSR1
    (``psyche leave``) to finish the round first. SIGTERM, and Ctrl-C without a node that can leave, cancel ``work``. A
    second Ctrl-C or SIGTERM exits at once; so does STOP_SECONDS after the first SIGTERM, because threads (preparing
    data, for example) cannot be cancelled.
    """
    received: set[int] = set()

    async def main() -> None:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()

        def ask_to_leave(*, quickly: bool) -> None:
            if leave_request is None or not leave_request.ask(quickly=quickly):
                task.cancel()

        def stop(number: int) -> None:
            if number in received:
                _exit_now(number)
            received.add(number)
            if number == signal.SIGINT:
                ask_to_leave(quickly=True)
            else:
                task.cancel()
                timer = threading.Timer(STOP_SECONDS, _exit_now, [number])
                timer.daemon = True
                timer.start()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
        if leave_request is not None:
            loop.add_signal_handler(signal.SIGUSR1, lambda: ask_to_leave(quickly=False))
        try:
            await task
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None

    asyncio.run(main())
    if signal.SIGINT in received:
        raise KeyboardInterrupt


def _exit_now(number: int) -> None:
    """Exit without cleaning up. Files are complete at any moment, and the kernel ends the child processes."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h\n")  # show the cursor, which the view hides
        sys.stdout.flush()
    os._exit(128 + number)


def _stay_with_parent() -> None:
    """If a launcher started this process, end when the launcher ends, however it ends."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
        sys.exit("psyche: the process that started this one has ended")


def _import_early() -> None:
    """Import what takes seconds while waiting anyway."""
    import psyche.processes.node_process  # noqa: F401
