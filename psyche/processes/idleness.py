"""Whether a machine is idle but for us: what other processes take of its CPUs and its GPU.

Input devices are not looked at: who may read them, and how, differs from desktop to desktop, and somebody who reads
a page can share. What disturbs, and is disturbed, is work.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

BUSY_CORES = 0.5
BUSY_SHARE = 0.1
"""Others' work counts from so many cores on, and from such a share of all cores: a desktop's own services take less."""
BUSY_GPU = 0.1
"""Of its time. A desktop that draws windows takes less, and a game more."""
BUSY_SAMPLES = 2
"""In a row, before the machine counts as busy: opening a page is not work."""
CALM_SECONDS = 300.0
"""Without any work, before it counts as idle again: a game has pauses, and coming back fetches a state."""


@dataclass(frozen=True)
class Load:
    """What processes other than ours take."""

    cores: float
    gpu: float = 0.0
    """Share of its time."""


@dataclass
class Idleness:
    """The verdict on a series of loads, on a machine with so many ``cores``. Idle until found busy."""

    cores: int
    idle: bool = True
    _busy: int = 0
    _calm_since: float | None = None

    def observe(self, load: Load, now: float) -> bool:
        """Whether the machine is idle after ``load`` was measured at ``now`` seconds."""
        if load.cores > max(BUSY_CORES, BUSY_SHARE * self.cores) or load.gpu > BUSY_GPU:
            self._busy, self._calm_since = self._busy + 1, None
            self.idle &= self._busy < BUSY_SAMPLES
        else:
            self._busy = 0
            self._calm_since = now if self._calm_since is None else self._calm_since
            self.idle |= now - self._calm_since >= CALM_SECONDS
        return self.idle


@dataclass(frozen=True)
class Spent:
    """CPU seconds so far: of all processes together, and of each of ours."""

    at: float
    all: float
    ours: Mapping[int, float] = field(default_factory=dict)

    def cores_of_others(self, before: Spent) -> float:
        """Taken between ``before`` and now."""
        ours = sum(seconds - before.ours.get(pid, 0.0) for pid, seconds in self.ours.items())
        return max(0.0, self.all - before.all - ours) / max(self.at - before.at, 1e-3)


class Sampler:
    """Measures loads. ``device`` is the GPU that this node trains on, if it is one."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = _Gpu.of(device)
        self._before = spent()

    def sample(self) -> Load:
        """The load since the last sample."""
        before, self._before = self._before, spent()
        gpu = 0.0 if self._gpu is None else self._gpu.share_of_others(set(self._before.ours))
        return Load(self._before.cores_of_others(before), gpu)


def spent() -> Spent:
    """What has been spent until now."""
    system = psutil.cpu_times()
    ours = {}
    for process in (me := psutil.Process(), *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            ours[process.pid] = times.user + times.system
    whole = sum(system) - system.idle - getattr(system, "iowait", 0.0)
    # A guest's time is in its host's, too.
    whole -= getattr(system, "guest", 0.0) + getattr(system, "guest_nice", 0.0)
    return Spent(time.monotonic(), whole, ours)


class _Gpu:
    """A GPU's use by process, from NVML."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._since = 0
        """Time stamp of the last sample, microseconds."""

    @classmethod
    def of(cls, device: torch.device) -> _Gpu | None:
        """None for a CPU, and where there is no NVML to ask: then the CPUs alone tell."""
        if device.type != "cuda":
            return None
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid  # CUDA_VISIBLE_DEVICES renumbers them
            return cls(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        except Exception:
            return None

    def share_of_others(self, ours: set[int]) -> float:
        """Of the GPU's time since the last call, by processes other than ``ours``. NVML gives a sample for each."""
        try:
            samples = self._nvml.nvmlDeviceGetProcessUtilization(self._handle, self._since)
        except self._nvml.NVMLError:  # nothing since then, or the driver does not tell
            return 0.0
        self._since = max((sample.timeStamp for sample in samples), default=self._since)
        return float(sum(sample.smUtil for sample in samples if sample.pid not in ours)) / 100


def cores() -> int:
    """Of this machine."""
    return psutil.cpu_count() or os.cpu_count() or 1
