"""``python -m psyche.bench.gpu``: see scripts/gpu_check.sh.

Exit status: 0 if every bit is as defined; 1 if one is not, or something failed; 2 if kernels could not be compared, or
not all in the available time; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING

from psyche.bench.gpu.environment import EVERYTHING, KERNELS, Budget, advice, missing_modules, parts_without

if TYPE_CHECKING:
    from psyche.bench.gpu.report import Report

EQUAL, DIFFERENT, NOT_COMPARED, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None, clock: Callable[[], float] = time.monotonic) -> int:
    chosen = _parsed(arguments)
    budget = Budget(60 * chosen.minutes, clock)
    lacking = missing_modules()
    for line in advice(lacking, emulate=chosen.emulate):
        print(f"gpu_check: {line}", file=sys.stderr)
    if {"torch", "numpy"} & set(lacking):
        return NOT_COMPARED
    return _check(chosen, lacking, budget)


def _check(chosen: argparse.Namespace, lacking: Sequence[str], budget: Budget) -> int:
    from psyche.bench.gpu.check import Check
    from psyche.bench.gpu.report import Report

    report = Report(chosen.out, budget, timed=not chosen.emulate)
    report.left_out += advice(lacking, emulate=chosen.emulate)
    parts = set(chosen.only) - parts_without(lacking, emulate=chosen.emulate)
    watch = Timer(budget.seconds, _give_up, [report])
    watch.daemon = True
    watch.start()
    try:
        if not _describe(report, chosen.emulate):
            parts = set()
        report.save()
        if parts:
            print(f"writing {chosen.out}/gpu_check.md and .json as results come", flush=True)
            Check(report, budget, emulate=chosen.emulate, elements=chosen.elements).run(parts)
        report.running = None
        print("\n" + report.save(), end="")
    except KeyboardInterrupt:
        report.stopped = f"interrupted during {report.running}"
        report.save()
        print(f"\ngpu_check: {report.stopped}; {chosen.out}/gpu_check.md has the results up to there", flush=True)
        return INTERRUPTED
    finally:
        watch.cancel()
    return _status(report, chosen.only)


def _describe(report: Report, emulate: bool) -> bool:
    """Describe the machine in the report. Returns whether anything can run on it; if nothing can, prints why."""
    import torch

    from psyche.bench.gpu.environment import describe
    from psyche.numerics.backends.cuda_device import unavailable_reason

    if emulate or (torch.version.cuda is not None and torch.cuda.is_available()):
        report.system |= describe(None if emulate else torch.device("cuda:0"))
        return True
    report.system |= describe(None) | {"device": "no GPU"}
    print(f"gpu_check: {unavailable_reason()}", file=sys.stderr)
    report.left_out.append(f"everything: {unavailable_reason()}")
    return False


def _status(report: Report, wanted: Sequence[str]) -> int:
    if any(report.differences.values()) or report.failures:
        return DIFFERENT
    return EQUAL if report.all_compared or KERNELS not in wanted else NOT_COMPARED


def _give_up(report: Report, leave: Callable[[int], object] = os._exit) -> None:
    """End the process when the time is up: a kernel that never ends cannot be interrupted."""
    report.stopped = f"the time was up during {report.running}"
    print(f"\ngpu_check: {report.stopped}; the report has the results up to there", flush=True)
    try:
        report.save()
    finally:
        leave(DIFFERENT if any(report.differences.values()) or report.failures else NOT_COMPARED)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description="Check and time psyche on this machine's GPU.")
    parser.add_argument("--emulate", action="store_true", help="run the check itself without a GPU, on tiny tensors")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit for the whole check (default: 8)")
    parser.add_argument("--only", nargs="+", choices=EVERYTHING, default=EVERYTHING, help="run only these parts")
    parser.add_argument("--elements", type=int, default=1 << 26, help="fp32 values to time on (default: 2^26)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="directory for the report")
    chosen = parser.parse_args(arguments)
    if chosen.elements <= 0 or chosen.elements % 4096 != 0:
        parser.error("--elements must be a multiple of 4096")
    if not 0 < chosen.minutes < 1e5:
        parser.error("--minutes must be above 0")
    return chosen


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores SIGINT by default
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
