"""What a node trains on, and in which precision."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import torch

from psyche.errors import PsycheError
from psyche.sizes import byte_count

if TYPE_CHECKING:
    from psyche.config import Node


def pick_device(wanted: str) -> torch.device:
    """``auto`` is the first CUDA device if there is one. Raises :class:`PsycheError` for one that is not there.

    A CUDA device has a number, also where ``wanted`` has none: torch's memory limits refuse one without.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda:0" if wanted == "cuda" else wanted)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise PsycheError(
            f"there is no device {wanted} here: torch sees {torch.cuda.device_count()} CUDA devices; "
            "install the NVIDIA driver, or use --device cpu"
        )
    return device


def memory_limit(node: Node) -> int | None:
    """Bytes that a process of this node may take of its GPU, if not all."""
    return None if node.max_gpu_memory is None else byte_count(node.max_gpu_memory)


def limit_memory(limit: int | None, device: torch.device) -> None:
    """Have PyTorch take no more than ``limit`` bytes of a GPU: past it is out of memory. Nothing on a CPU."""
    if limit is None or device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)


def pick_precision(wanted: str, device: torch.device) -> torch.dtype | None:
    """Autocast dtype for forward and backward, or None for plain fp32. ``auto``: bf16 where the GPU has it."""
    if wanted == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bf16 else None
    return torch.bfloat16 if wanted == "bf16" else None


def gpu_memory(gpus: int) -> tuple[int, ...]:
    """Bytes free on each of so many GPUs.

    Whoever looks leaves a CUDA context of some hundred MB behind: where ranks are to train, a process that ends looks.
    """
    if gpus < 2:
        return tuple(torch.cuda.mem_get_info(gpu)[0] for gpu in range(gpus))
    look = f"import json, torch; print(json.dumps([torch.cuda.mem_get_info(gpu)[0] for gpu in range({gpus})]))"
    try:
        found = subprocess.run([sys.executable, "-c", look], capture_output=True, check=True, text=True)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.splitlines() or ["no reason given"])[-1]
        raise PsycheError(f"the GPUs' memory cannot be read: {reason}; nvidia-smi shows what is wrong") from None
    return tuple(json.loads(found.stdout))
