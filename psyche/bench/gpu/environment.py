"""What the check depends on: installed modules, time, and the machine. Imports the standard library only."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

KERNELS, TIMES, TRAINING = "kernels", "times", "training"
PARTS: Mapping[str, str] = {
    KERNELS: "kernels against the definition",
    TIMES: "kernel times",
    TRAINING: "training speed",
}
"""The parts in the order in which they run."""
EVERYTHING = tuple(PARTS)
NEEDED: Mapping[str, tuple[str, Sequence[str]]] = {
    "torch": ("torch>=2.8", EVERYTHING),
    "numpy": ("numpy>=2", EVERYTHING),
    "cuda.core": ("cuda-core>=1.2", (KERNELS, TIMES)),
    "cuda.bindings": ("cuda-bindings>=13,<14", (KERNELS, TIMES)),
    "transformers": ("transformers", (TRAINING,)),
}
"""For each module: what to install, and the parts that are left out without it."""

EMULATED_WITHOUT = ("cuda.core", "cuda.bindings")
"""Modules that the emulator does not need. Without them the compiler for a GPU is not tried."""

NVRTC = "nvidia-cuda-nvrtc>=13,<14"
"""Compiles the kernels. It is not listed above because a CUDA toolkit contains it, too."""

VERSIONS = ("numpy", "transformers", "safetensors", "triton", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc")


def missing_modules() -> list[str]:
    """List the modules of ``NEEDED`` that are not installed."""
    return [module for module in NEEDED if not _installed(module)]


def parts_without(modules: Iterable[str], *, emulate: bool) -> set[str]:
    """Return the parts that are left out if ``modules`` are missing."""
    needed = [module for module in modules if not (emulate and module in EMULATED_WITHOUT)]
    return {part for module in needed for part in NEEDED[module][1]}


def advice(modules: Sequence[str], *, emulate: bool) -> list[str]:
    """Return a line for each missing module, and the command that installs them all."""
    lines = []
    for module in modules:
        parts = ", ".join(PARTS[part] for part in NEEDED[module][1])
        if emulate and module in EMULATED_WITHOUT:
            parts = "compiling the kernels for a GPU"
        lines.append(f"{module} is not installed; left out without it: {parts}")
    if lines:
        wanted = [NEEDED[module][0] for module in modules] + [NVRTC] * bool(set(modules) & set(EMULATED_WITHOUT))
        lines.append("to add what is missing: python -m pip install " + " ".join(f"'{one}'" for one in wanted))
    return lines


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that results depend on."""
    found = {"Python": platform.python_version()}
    for package in VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


ENDS: Mapping[str, float] = {KERNELS: 0.5, TIMES: 0.65, TRAINING: 1.0}
"""Share of the time that may be used up when a part ends. The parts after it inherit unused time."""


class Budget:
    """The time that the whole check may take, from the moment this is made."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self.clock = clock
        self._start = clock()

    @property
    def used(self) -> float:
        return self.clock() - self._start

    def left(self, part: str) -> float:
        """Return seconds until ``part`` must end; negative if that is over."""
        return ENDS[part] * self.seconds - self.used


def describe(device: torch.device | None) -> dict[str, str]:
    """Describe the card, driver, packages and commit for the report; ``device`` is None if kernels are emulated."""
    import torch

    found = {"device": "emulated on the CPU"} if device is None else _card(device)
    old = tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 8)
    found["torch"] = f"{torch.__version__}, older than any that is supported" if old else torch.__version__
    found["CUDA of torch"] = str(torch.version.cuda)
    found |= versions()
    found["host"] = f"{platform.platform()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    folder = Path(__file__).parent
    commit = _output("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12")
    found["commit"] = commit or "unknown: no git checkout"
    found["begun"] = datetime.now().astimezone().isoformat(timespec="seconds")
    return found


def _card(device: torch.device) -> dict[str, str]:
    import torch

    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    query = "--query-gpu=name,driver_version,power.limit,clocks.max.sm,clocks.max.memory"
    driver = _output("nvidia-smi", query, "--format=csv,noheader")
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f}",
        "driver, power limit, clocks": driver or "unknown: nvidia-smi does not answer",
    }


def _output(*command: str) -> str | None:
    """Return a command's output as one line, or None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(done.stdout.split("\n")).strip("; ")
