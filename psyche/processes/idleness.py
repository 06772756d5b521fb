"""Whether a machine is idle: how much of its CPUs and GPU processes other than this node use.

Keyboard and mouse are not watched: access differs between desktops, and a person reading does not mind. What conflicts
with training is other computation.
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
"""Use by others above both this many cores and this share of all cores is work. A desktop's own services use less."""
BUSY_GPU = 0.1
"""Share of GPU time. Drawing a desktop uses less, a game more."""
BUSY_SAMPLES = 2
"""Consecutive busy samples after which the machine counts as busy; opening a web page takes one."""
CALM_SECONDS = 300.0
"""Seconds without a busy sample after which the machine is idle again. Games pause, and rejoining costs a download."""


@dataclass(frozen=True)
class Load:
    """Use by processes other than this node's."""

    cores: float
    gpu: float = 0.0
    """Share of GPU time."""


@dataclass
class IdleDetector:
    """Decides from a series of loads whether a machine with ``cores`` cores is idle. It starts as idle."""

    cores: int
    idle: bool = True
    _busy: int = 0
    _calm_since: float | None = None

    def observe(self, load: Load, now: float) -> bool:
        """Return whether the machine is idle, given ``load`` as measured at ``now`` (seconds)."""
        if load.cores > max(BUSY_CORES, BUSY_SHARE * self.cores) or load.gpu > BUSY_GPU:
            self._busy, self._calm_since = self._busy + 1, None
            self.idle &= self._busy < BUSY_SAMPLES
        else:
            self._busy = 0
            self._calm_since = now if self._calm_since is None else self._calm_since
            self.idle |= now - self._calm_since >= CALM_SECONDS
        return self.idle


@dataclass(frozen=True)
class CpuTime:
    """CPU seconds used so far: by all processes, and by each process of this node."""

    at: float
    all: float
    ours: Mapping[int, float] = field(default_factory=dict)

    def cores_of_others(self, before: CpuTime) -> float:
        """Return how many cores other processes used on average since ``before``."""
        ours = sum(seconds - before.ours.get(pid, 0.0) for pid, seconds in self.ours.items())
        return max(0.0, self.all - before.all - ours) / max(self.at - before.at, 1e-3)


class LoadSampler:
    """Measures the load between calls. ``device`` is the device that this node trains on."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = _Gpu.of(device)
        self._before = cpu_time()

    def sample(self) -> Load:
        """Return the load since the previous sample."""
        before, self._before = self._before, cpu_time()
        gpu = 0.0 if self._gpu is None else self._gpu.share_of_others(set(self._before.ours))
        return Load(self._before.cores_of_others(before), gpu)


def cpu_time() -> CpuTime:
    """Measure the CPU time used until now."""
    system = psutil.cpu_times()
    ours = {}
    for process in (me := psutil.Process(), *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            ours[process.pid] = times.user + times.system
    whole = sum(system) - system.idle - getattr(system, "iowait", 0.0)
    # user and nice time already include the guest's
    whole -= getattr(system, "guest", 0.0) + getattr(system, "guest_nice", 0.0)
    return CpuTime(time.monotonic(), whole, ours)


class _Gpu:
    """Use of one GPU by process, from NVML."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._since = 0
        """Time stamp of the last sample in microseconds."""

    @classmethod
    def of(cls, device: torch.device) -> _Gpu | None:
        """Open NVML for ``device``. None for a CPU or without NVML; then only CPU use counts."""
        if device.type != "cuda":
            return None
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid  # an index would depend on CUDA_VISIBLE_DEVICES
            return cls(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        except Exception:
            return None

    def share_of_others(self, ours: set[int]) -> float:
        """Return the share of GPU time since the last call used by processes whose pid is not in ``ours``."""
        try:
            samples = self._nvml.nvmlDeviceGetProcessUtilization(self._handle, self._since)
        except self._nvml.NVMLError:  # no sample since then, or the driver does not report it
            return 0.0
        self._since = max((sample.timeStamp for sample in samples), default=self._since)
        return float(sum(sample.smUtil for sample in samples if sample.pid not in ours)) / 100


def cores() -> int:
    """Return this machine's number of logical CPUs."""
    return psutil.cpu_count() or os.cpu_count() or 1
