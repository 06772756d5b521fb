"""The parameters and moments that one rank holds, and where DeepSpeed keeps them.

DeepSpeed has two copies of a parameter: the master weights, partitioned over the ranks and stepped by the optimizer,
and the model's own. ``safe_set_full_fp32_param`` sets only the first, so the next forward pass would use the old
weights. Writes here go to the masters; :meth:`Partitions.publish` then does what DeepSpeed does at the end of a step:
it copies the masters to the model and gathers them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from psyche.numerics.flat import FlatLayout
from psyche.training.zero.rank_messages import Kind

Parts = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Partition:
    """A range that this rank holds: ``master[at : at + count]`` corresponds to ``flat[start : start + count]``."""

    master: Tensor
    """Flat fp32 master weights of one parameter group on this rank. The optimizer's state is keyed by this tensor."""
    at: int
    start: int
    count: int


class Partitions(ABC):
    """One rank's ranges: copies between the shared flat vector and DeepSpeed's tensors."""

    def __init__(self, zero: Any, model: nn.Module, layout: FlatLayout) -> None:
        """``zero`` is DeepSpeed's optimizer, a wrapper of torch's."""
        self._zero = zero
        names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        starts = {span.name: span.start for span in layout.spans}
        self._partitions = [
            Partition(master, at, starts[name] + first, count)
            for name, parameter in names.items()
            for master, at, first, count in self._held(parameter)
        ]

    @abstractmethod
    def _held(self, parameter: nn.Parameter) -> Iterator[tuple[Tensor, int, int, int]]:
        """Yield (master, position in it, first element of the parameter, count) for each range held by this rank."""

    @abstractmethod
    def publish(self) -> None:
        """Copy the masters to the model. All ranks must call it."""

    @torch.no_grad()
    def read(self, kind: Kind, flat: Tensor) -> None:
        """Copy this rank's ranges to ``flat``."""
        for partition in self._partitions:
            flat[partition.start : partition.start + partition.count].copy_(self._tensor(kind, partition))

    @torch.no_grad()
    def write(self, kind: Kind, flat: Tensor, parts: Parts) -> None:
        """Copy this rank's part of the ranges ``parts`` from ``flat``."""
        for target, source in self._within(kind, flat, parts):
            target.copy_(source)

    @torch.no_grad()
    def shift(self, flat: Tensor, parts: Parts) -> None:
        """Add ``flat`` to this rank's parameters in the ranges ``parts``."""
        for target, source in self._within("theta", flat, parts):
            target.add_(source.to(target.device))

    def resume(self, steps: int) -> None:
        """Set the optimizer's step count. Its moments stay as written; after 0 steps its state is dropped."""
        for partition in self._partitions:
            if steps:
                self._state(partition)["step"].fill_(steps)
            else:
                self._zero.optimizer.state.pop(partition.master, None)

    def _within(self, kind: Kind, flat: Tensor, parts: Parts) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the elements of each partition that lie in ``parts``, with the same elements of ``flat``."""
        for partition in self._partitions:
            held = self._tensor(kind, partition)
            for start, stop in parts:
                low, high = max(start, partition.start), min(stop, partition.start + partition.count)
                if low < high:
                    yield held[low - partition.start : high - partition.start], flat[low:high]

    def _tensor(self, kind: Kind, partition: Partition) -> Tensor:
        whole = partition.master if kind == "theta" else self._state(partition)[kind]
        return whole.detach()[partition.at : partition.at + partition.count]

    def _state(self, partition: Partition) -> dict[str, Tensor]:
        """AdamW's state, which AdamW creates at its first step; created here where it is needed earlier."""
        state: dict[str, Tensor] = self._zero.optimizer.state[partition.master]
        if not state:
            state["step"] = torch.zeros((), device=partition.master.device)
            state["exp_avg"] = torch.zeros_like(partition.master)
            state["exp_avg_sq"] = torch.zeros_like(partition.master)
        return state


class OptimizerPartitions(Partitions):
    """ZeRO 1 and 2: masters and moments are partitioned over the ranks; each rank has the whole model."""

    def _held(self, parameter: nn.Parameter) -> Iterator[tuple[Tensor, int, int, int]]:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # set by DeepSpeed; None: held by other ranks
        if mapping is not None:
            master = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
            held, own = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield master, held.start, own.start, own.numel

    def publish(self) -> None:
        self._zero.update_lp_params()


class ParameterPartitions(Partitions):
    """ZeRO 3: the model is partitioned over the ranks, too, tensor by tensor."""

    def _held(self, parameter: nn.Parameter) -> Iterator[tuple[Tensor, int, int, int]]:
        group, at, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        ds: Any = parameter
        first = ds.ds_tensor.ds_numel * torch.distributed.get_rank()
        count = min(ds.ds_tensor.ds_numel, ds.ds_numel - first)  # the partitions of the last ranks are padded
        if count > 0:
            yield self._zero.fp32_partitioned_groups_flat[group], at, first, count

    def publish(self) -> None:
        zero = self._zero
        zero._partition_all_parameters()  # gathered parameters still have the old weights
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if kept := zero.persistent_parameters:  # small parameters, which stay gathered
            kept[0].all_gather(kept)
