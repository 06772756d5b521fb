"""How much memory there is, and how many sequences of a model fit into it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

ROOM = 1.5
"""What a backward pass takes over what it keeps for itself: gradients on their way, and what the allocator wastes. A
guess: where it is too low on a GPU, the step that does not fit is taken again in smaller pieces."""
SHARE = 0.8
"""Of the free memory that a node takes: others live on this machine, too."""


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on ``device``, within what it was limited to there."""
    if device.type == "cuda":
        reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        limit = int(total * torch.cuda.get_per_process_memory_fraction(device))
        return max(0, min(free + reserved, limit) - used)
    return available_memory()


def available_memory() -> int:
    """Bytes of RAM that programs can still take, within the limit of the container that we may be in."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, max(0, int(limit) - used)) if limit.isdigit() else free


def most_at_once(each: int, free: int, once: int = 0) -> int:
    """How many sequences to take at once at most: at least one, whatever is free.

    Bytes: each keeps ``each``, and all together ``once``, such as weights cast for autocast.
    """
    return max(1, int((SHARE * free - ROOM * once) / (ROOM * max(each, 1))))


def piece_size(rows: int, most: int) -> int:
    """Sequences of a piece where ``rows`` are taken in as few as there can be, at ``most`` so many at once."""
    pieces = -(-rows // most)
    return -(-rows // pieces)


def kept_by(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that ``forward`` keeps to go backward, but for the storage of ``parameters``. Consumes no randomness."""
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[_identity(storage)] = storage  # which it keeps alive, so that no two have one identity
        return tensor

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        forward()
    for parameter in parameters:
        kept.pop(_identity(parameter.untyped_storage()), None)
    return sum(storage.nbytes() for storage in kept.values())


def _identity(storage: torch.UntypedStorage) -> int:
    """Of what it holds: on the meta device it has no address."""
    identity: int = storage._cdata
    return identity
