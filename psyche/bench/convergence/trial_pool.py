"""Trials on all cores, with one process and one thread each: small models train fastest that way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager

from psyche.bench.convergence.trial import Outcome, Setting, Trial, run_trial

MAX_WORKERS = 16
"""Each process needs about half a gigabyte for PyTorch and the corpus."""


def run_all(setting: Setting, trials: Iterable[Trial], done: Callable[[Trial, Outcome], None]) -> dict[Trial, Outcome]:
    """Run every different trial once; ``done`` is called in this process as each ends.

    No child outlives this call, whether it ends by the last trial, an error, Ctrl-C or SIGKILL.
    """
    # Longest first, so that no long trial is left to one core at the end.
    waiting = sorted(set(trials), key=lambda trial: (-trial.batches, str(trial)))
    workers = min(os.cpu_count() or 1, len(waiting), MAX_WORKERS)
    outcomes: dict[Trial, Outcome] = {}
    with _executor(max(1, workers)) as executor:
        with _ctrl_c_held():
            futures = {executor.submit(run_trial, setting, trial): trial for trial in waiting}
        for future in as_completed(futures):
            outcomes[futures[future]] = future.result()
            done(futures[future], outcomes[futures[future]])
    return outcomes


@contextmanager
def _executor(workers: int) -> Iterator[ProcessPoolExecutor]:
    # spawn: a forked child would inherit torch's threads in an unknown state
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    try:
        yield executor
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_held() -> Iterator[None]:
    """Start children that ignore Ctrl-C, which a terminal sends to all processes: the parent ends them.

    The parent receives a Ctrl-C after the block. Blocking the signal does not suffice: another thread may receive it,
    and Python then interrupts the main thread while it writes to a child that is starting."""
    heard: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number)) if in_main else None
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        if in_main:
            signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
        if heard:
            signal.raise_signal(signal.SIGINT)


def _follow_parent() -> None:
    """In a child: end when the parent ends, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
