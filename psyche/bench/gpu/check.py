"""The parts of the check, one after another, within the time limit."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch

from psyche.bench.gpu.environment import (
    EMULATED_WITHOUT,
    KERNELS,
    NVRTC,
    PARTS,
    TIMES,
    TRAINING,
    Budget,
    missing_modules,
)
from psyche.bench.gpu.equality import comparisons, differences
from psyche.bench.gpu.machine import Emulated, Gpu, Machine
from psyche.bench.gpu.report import Report
from psyche.bench.gpu.timing import TIMED, timings
from psyche.bench.gpu.training import COMPILING, LARGE, SMALL, TINY, Workload, compiled_speed, speeds
from psyche.numerics.backends.cuda_compile import cubin

COLLECTED = 10
"""Differences collected for one comparison; more would add nothing."""


@dataclass(frozen=True)
class Task:
    """A step of seconds, after which the report is written."""

    name: str
    run: Callable[[], str]
    """Adds to the report, and returns the text to print."""
    needs: float = 0.0
    """Seconds that must be left for it to start."""


class Check:
    """Fills a report."""

    def __init__(self, report: Report, budget: Budget, *, emulate: bool, elements: int) -> None:
        self._report, self._budget = report, budget
        self._emulate, self._elements = emulate, elements
        self._micro_batches: dict[str, int] = {}

    def run(self, parts: Collection[str]) -> None:
        """Run the named parts. A failure is reported, and the rest goes on."""
        if KERNELS in parts or TIMES in parts:
            machine = self._build()
            if machine is None:
                self._report.left_out += [f"{PARTS[part]}: no kernels" for part in (KERNELS, TIMES) if part in parts]
            else:
                if KERNELS in parts:
                    self._part(KERNELS, self._comparisons(machine))
                if TIMES in parts:
                    self._part(TIMES, [Task(name, partial(self._time, machine, name)) for name in TIMED])
            del machine
        if TRAINING in parts and self._usable():
            self._part(TRAINING, self._trainings())
        self._report.running = None

    def _build(self) -> Machine | None:
        """Build or load the kernels, and return the device that runs them."""
        self._report.running = "building the kernels"
        self._report.save()
        began = time.perf_counter()
        try:
            machine: Machine = Emulated() if self._emulate else Gpu(self._elements)
        except Exception as error:  # from the C++ compiler, NVRTC, cuda.core or the driver
            hint = "" if "nvrtc" not in str(error).lower() else f"; NVRTC comes with python -m pip install '{NVRTC}'"
            self._failed("building the kernels", error, hint)
            return None
        self._report.system["kernels built or loaded in"] = f"{time.perf_counter() - began:.1f} s"
        if self._emulate:
            self._compile_unused()
        return machine

    def _compile_unused(self) -> None:
        """Try the compiler that a GPU would need."""
        if set(missing_modules()) & set(EMULATED_WITHOUT):
            return  # the report says so already
        began = time.perf_counter()
        try:
            size = len(cubin("90"))
        except Exception as error:  # NVRTC or cuda.core is missing, or another version than expected
            self._report.left_out.append(f"compiling the kernels for a GPU: {_reason(error)}")
            return
        seconds = time.perf_counter() - began
        self._report.system["cubin for sm_90"] = f"{size:,} bytes, compiled or loaded in {seconds:.1f} s"

    def _comparisons(self, machine: Machine) -> list[Task]:
        planned = comparisons(machine)
        names = [name for name, _ in planned]
        self._report.expected = {name: names.count(name) for name in names}
        return [
            Task(f"{name}, {count:,} elements", partial(self._compare, machine, name, count)) for name, count in planned
        ]

    def _compare(self, machine: Machine, name: str, count: int) -> str:
        found = list(islice(differences(machine, name, count), COLLECTED))
        self._report.differences.setdefault(name, []).extend(found)
        self._report.compared.setdefault(name, []).append(count)
        return f"DIFFERENT: {found[0]}" if found else "equal"

    def _time(self, machine: Machine, name: str) -> str:
        found = []
        for timing in timings(machine, name):
            self._report.timings.append(timing)
            self._report.save()
            found.append(f"{timing.step} {timing.share_of_copy:.0%}" if machine.timed else timing.step)
        return ", ".join(found)

    def _trainings(self) -> list[Task]:
        if self._emulate:
            self._report.left_out.append("training with torch.compile: only on a GPU")
            return [Task(f"training, {TINY.name}", partial(self._train, TINY))]
        tasks = [Task(f"training, {work.name}", partial(self._train, work)) for work in (SMALL, LARGE)]
        name = f"training, {LARGE.name}, compiled"
        return [
            *tasks,
            Task(name, partial(self._train_compiled, LARGE), needs=min(COMPILING, self._budget.seconds / 4)),
        ]

    def _train(self, workload: Workload) -> str:
        found = []
        for speed in speeds(workload, self._device, self._budget.clock):
            self._micro_batches[workload.name] = speed.micro_batch
            self._report.speeds.append(speed)
            self._report.save()
            found.append(f"{speed.way} {speed.tokens_per_second:,.0f} tokens/s")
        return ", ".join(found)

    def _train_compiled(self, workload: Workload) -> str:
        rows = self._micro_batches.get(workload.name)
        if rows is None:
            self._report.left_out.append(f"training, {workload.name}, compiled: uncompiled it was not measured")
            return "left out"
        speed = compiled_speed(workload, self._device, self._budget.clock, rows)
        self._report.speeds.append(speed)
        return f"{speed.tokens_per_second:,.0f} tokens/s"

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu" if self._emulate else "cuda:0")

    def _usable(self) -> bool:
        """Return whether the GPU still works: a kernel that fails can make it unusable in this process."""
        if self._emulate:
            return True
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            again = f"run again with --only {TRAINING}"
            self._report.left_out.append(f"{PARTS[TRAINING]}: the GPU no longer answers ({_reason(error)}); {again}")
            return False
        return True

    def _part(self, part: str, tasks: Sequence[Task]) -> None:
        print(PARTS[part], flush=True)
        for number, task in enumerate(tasks):
            if self._budget.left(part) <= task.needs:
                rest = "; ".join(one.name for one in tasks[number:])
                self._report.left_out.append(f"{PARTS[part]}: the time was up before {rest}")
                print(f"  time is up, {len(tasks) - number} of {len(tasks)} left out", flush=True)
                break
            self._report.running = task.name
            self._report.save()
            print(f"  {task.name}: ", end="", flush=True)
            try:
                print(task.run(), flush=True)
            except Exception as error:
                self._failed(task.name, error)
            self._report.save()

    def _failed(self, name: str, error: Exception, hint: str = "") -> None:
        traceback.print_exception(error, file=sys.stderr)
        self._report.failures.append(f"{name}: {_reason(error)}{hint}")
        print(f"FAILED: {name}: {_reason(error)}{hint}", flush=True)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
