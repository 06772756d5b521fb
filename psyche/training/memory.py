"""How much memory is free, what a model's activations take, and how many sequences fit at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # scripts/gpu_check.sh trains without pydantic
    from psyche import config

OVERHEAD = 1.5
"""Memory of a backward pass relative to its saved activations: gradients in flight and allocator waste. An estimate:
where it is too low on a GPU, the step is repeated with smaller micro-batches."""
MEMORY_SHARE = 0.8
"""The share of the free memory that a node uses, because other programs run on the machine, too."""
PROBE = 16
"""Tokens of the shortest of the three sequences that :func:`activation_bytes` measures."""


def free_memory(device: torch.device) -> int:
    """Return bytes that this process can still allocate on ``device``, within its own limit."""
    if device.type == "cuda":
        reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        limit = int(total * torch.cuda.get_per_process_memory_fraction(device))
        return max(0, min(free + reserved, limit) - used)
    return available_memory()


def available_memory() -> int:
    """Return bytes of RAM that programs can still allocate, within the limit of the container, if there is one."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, max(0, int(limit) - used)) if limit.isdigit() else free


def max_micro_batch(each: int, free: int, once: int = 0) -> int:
    """Return the most sequences per forward pass, at least one.

    In bytes: a sequence saves ``each`` for the backward pass; ``once`` is independent of their number, such as weights
    cast for autocast.
    """
    return max(1, int((MEMORY_SHARE * free - OVERHEAD * once) / (OVERHEAD * max(each, 1))))


def micro_batch_size(rows: int, most: int) -> int:
    """Split ``rows`` sequences into as few micro-batches of at most ``most`` as possible; returns their size."""
    micro_batches = -(-rows // most)
    return -(-rows // micro_batches)


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Return bytes that ``forward`` saves for the backward pass, without the storage of ``parameters``.

    Does not advance any random number generator.
    """
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[_identity(storage)] = storage  # keeps the storage alive, so that identities stay unique
        return tensor

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        forward()
    for parameter in parameters:
        saved.pop(_identity(parameter.untyped_storage()), None)
    return sum(storage.nbytes() for storage in saved.values())


def activation_bytes(spec: config.Model, length: int, *, recompute: bool) -> int:
    """Return bytes of bf16 activations that one sequence of ``length`` tokens saves; ``recompute``: with checkpointing.

    Runs the model on the meta device, which allocates nothing. Attention is assumed to be fused: without that, its
    weights alone grow with the square of the length, and they are not counted. (By shape they cannot be told from other
    saved tensors that are as wide as the sequence is long.) Within a tenth of what the demo's model saves on a CPU.
    """
    from psyche.training.models import build  # needs pydantic

    model = build(spec, device="meta").to(torch.bfloat16).train()
    if recompute:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    one, two, three = (_sequence_bytes(model, times * PROBE) for times in (1, 2, 3))
    squared = (three - 2 * two + one) // 2
    linear = two - one - 3 * squared
    return one - linear - squared + linear * length // PROBE


def _sequence_bytes(model: nn.Module, length: int) -> int:
    """Return bytes that a sequence of ``length`` tokens saves for the backward pass."""
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    # without a mask transformers would inspect the values of the positions
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")

    def forward() -> Tensor:
        loss: Tensor = model(input_ids=tokens, attention_mask=mask, labels=tokens, use_cache=False).loss
        return loss

    return saved_bytes(forward, model.parameters())


def _identity(storage: torch.UntypedStorage) -> int:
    """Return a number that identifies a storage; on the meta device storages have no address."""
    identity: int = storage._cdata
    return identity
