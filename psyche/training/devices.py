"""Devices, their memory limits, and the precision of training."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import torch

from psyche.errors import PsycheError

if TYPE_CHECKING:
    from psyche.config import Node


def pick_device(wanted: str) -> torch.device:
    """Resolve ``node.device``: ``auto`` is the first CUDA device, or the CPU. Raises :class:`PsycheError` if absent.

    The result always has an index for CUDA, because torch's memory limits need one.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda:0" if wanted == "cuda" else wanted)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise PsycheError(
            f"device {wanted} does not exist: torch sees {torch.cuda.device_count()} CUDA devices; "
            "install the NVIDIA driver, or use --device cpu"
        )
    return device


def memory_limit(node: Node) -> int | None:
    """Return bytes of GPU memory that a process of this node may use; None: all of it."""
    if node.max_gpu_memory is None:
        return None
    from psyche.config.units import byte_count  # scripts/gpu_check.sh trains without pydantic

    return byte_count(node.max_gpu_memory)


def limit_memory(limit: int | None, device: torch.device) -> None:
    """Limit PyTorch to ``limit`` bytes of a GPU; beyond it, allocations fail. No effect on a CPU."""
    if limit is None or device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)


def pick_precision(wanted: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype of forward and backward; None is plain fp32. ``auto``: bf16 where the GPU supports
    it."""
    if wanted == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bf16 else None
    return torch.bfloat16 if wanted == "bf16" else None


def gpu_memory(gpus: int) -> tuple[int, ...]:
    """Free bytes on each of the first ``gpus`` GPUs. Raises :class:`PsycheError` where they cannot be read.

    Reading them creates a CUDA context of some hundred MB, so with several GPUs, where ranks train, a child does it.
    """
    if gpus < 2:
        return tuple(torch.cuda.mem_get_info(gpu)[0] for gpu in range(gpus))
    script = f"import json, torch; print(json.dumps([torch.cuda.mem_get_info(gpu)[0] for gpu in range({gpus})]))"
    try:
        found = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.splitlines() or ["no reason given"])[-1]
        raise PsycheError(f"cannot read the memory of the GPUs: {reason}; see what nvidia-smi reports") from None
    return tuple(json.loads(found.stdout))
