"""Child processes of a measurement: started in a place, told apart by pid, and gone when the measurement ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from psyche.bench.harness.shaped_links import Place

STOP_SECONDS = 15.0
"""How long a process may take to end after it was asked to."""
POLL_SECONDS = 0.02


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Within the block SIGTERM raises KeyboardInterrupt, so that clean-up runs. For the main thread."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def spawn(
    arguments: Sequence[str],
    place: Place,
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start ``python -m arguments…`` at ``place``, in a session of its own. End it with :func:`reap`.

    stderr goes to ``log``, and so does stdout unless it is given.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            place.command([sys.executable, "-m", *arguments]),
            stdin=stdin,
            stdout=output if stdout is None else stdout,
            stderr=output,
            bufsize=0,
            env=os.environ | {"PSYCHE_PARENT": str(os.getpid())} | dict(environment or {}),
            start_new_session=True,
        )


@contextlib.contextmanager
def running(
    arguments: Sequence[str], place: Place, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """:func:`spawn` a process; at the end of the block it receives SIGINT and is reaped."""
    process = spawn(arguments, place, log, environment=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        reap(process, time.monotonic() + STOP_SECONDS)


def reap(process: subprocess.Popen[bytes], deadline: float) -> None:
    """Wait until ``deadline`` (monotonic) for a process to end, then kill its whole session, ended or not.

    The process must lead a session of its own (``start_new_session``).
    """
    if process.returncode is None:
        # WNOWAIT keeps the pid reserved: the session that is killed below cannot be another process's.
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    """Return the last line that a process which has ended wrote to its log."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
    return lines[-1].removeprefix("psyche: ")
