"""What the results depend on: the card, its driver, the packages, and the version of this code."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path

import torch

from psyche.bench.gpu.requirements import versions


def describe(device: torch.device | None) -> dict[str, str]:
    """Names and values for the report; ``device`` is None where the kernels are emulated."""
    found = {"device": "emulated on the CPU"} if device is None else _card(device)
    old = tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 8)
    found["torch"] = f"{torch.__version__}, older than any that is supported" if old else torch.__version__
    found["CUDA of torch"] = str(torch.version.cuda)
    found |= versions()
    found["host"] = f"{platform.platform()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    folder = Path(__file__).parent
    commit = _said("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12")
    found["commit"] = commit or "unknown: no git checkout"
    found["begun"] = datetime.now().astimezone().isoformat(timespec="seconds")
    return found


def _card(device: torch.device) -> dict[str, str]:
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    query = "--query-gpu=name,driver_version,power.limit,clocks.max.sm,clocks.max.memory"
    driver = _said("nvidia-smi", query, "--format=csv,noheader")
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f}",
        "driver, power limit, clocks": driver or "unknown: nvidia-smi does not answer",
    }


def _said(*command: str) -> str | None:
    """The command's output as one line, or None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(done.stdout.split("\n")).strip("; ")
