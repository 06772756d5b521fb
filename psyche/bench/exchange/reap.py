"""Ending processes so that nothing of theirs is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator

POLL_SECONDS = 0.02


@contextlib.contextmanager
def ended_politely() -> Iterator[None]:
    """SIGTERM within the block is like Ctrl-C, so that what has to be undone is. For the main thread."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def reap(process: subprocess.Popen[bytes], deadline: float) -> None:
    """Wait until ``deadline`` (monotonic) for a process to end; then end it, and in any case all of its session.

    It must lead a session of its own (``start_new_session``).
    """
    if process.returncode is None:
        # Not waited for yet, so that the number of its session cannot be somebody else's when that is killed.
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
